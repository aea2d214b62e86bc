"""Keys and values that grow in place: the library's dynamic cache without a copy of everything for every token.

`DynamicCache` joins the cached states and the new ones by `torch.cat`, which moves the whole cache through memory for
each token; on a CPU with sixteen rows that was two fifths of decoding. Here a layer keeps a buffer with room for
`ROOM` more tokens and hands out views of it. What else a cache does (crop, reorder, repeat, windows, deep copies)
stays the library's: it replaces `keys` and `values`, and states that no longer lie in the buffer move to a new one at
the next token. The price is that room, and that compiled code, and gradients through a cache, join as before.
"""

import torch
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

ROOM = 256  # tokens; one copy in so many


class GrowingStates:
    """Joins (B, H, T, D) states with new ones; `buffer` is what they lie in, if anything.

    `held` are the states handed out last, which begin at `start`: if those come back, nothing need be looked up."""

    buffer: torch.Tensor | None = None
    held: torch.Tensor | None = None
    start: int = 0

    def append(self, states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """(B, H, T, D) and (B, H, n, D) -> (B, H, T + n, D), a view; equal to `torch.cat` along the tokens."""
        length, more = (states.shape[-2] if states.numel() else 0), new.shape[-2]
        start = self.place(states, more) if length else None
        if start is None:
            batch, heads, _, size = new.shape
            self.buffer, start = new.new_empty(batch, heads, length + more + ROOM, size), 0
            if length:
                self.buffer[:, :, :length] = states
        end = start + length + more
        self.buffer[:, :, end - more : end] = new
        self.held, self.start = self.buffer[:, :, start:end], start
        return self.held

    def keep(self, length: int) -> torch.Tensor:
        """The last so many of the states that were handed out."""
        have = self.held.shape[-2]
        if length < have:
            self.held, self.start = self.held[:, :, have - length :], self.start + have - length
        return self.held

    def place(self, states: torch.Tensor, more: int) -> int | None:
        """Where in the buffer the states begin; None if they lie elsewhere or have no room for `more` behind them."""
        buffer = self.buffer
        if buffer is None or (buffer.is_inference() and not torch.is_inference_mode_enabled()):
            return None  # what inference mode made may no longer be written to
        start = self.start
        if states is not self.held:
            if states.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr():
                return None
            if states.shape[:2] != buffer.shape[:2] or states.stride() != buffer.stride():
                return None
            start, beside = divmod(states.storage_offset(), buffer.shape[-1])
            if beside:
                return None
        return start if start + states.shape[-2] + more <= buffer.shape[-2] else None


class GrowingMixin:
    """Before a dynamic layer: the same states, joined in place."""

    @classmethod
    def take_over(cls, layer: DynamicLayer) -> "GrowingMixin":
        """A growing layer with the states of a library's one."""
        growing = cls.__new__(cls)
        growing.__dict__.update(layer.__dict__)
        growing.growing_keys, growing.growing_values = GrowingStates(), GrowingStates()
        return growing

    def join(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.growing_keys.append(self.keys, key_states), self.growing_values.append(self.values, value_states)


class GrowingLayer(GrowingMixin, DynamicLayer):
    def update(self, key_states, value_states, *args, **kwargs):
        if must_copy(key_states):
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = self.join(key_states, value_states)
        return self.keys, self.values


class GrowingSlidingWindowLayer(GrowingMixin, DynamicSlidingWindowLayer):
    def update(self, key_states, value_states, *args, **kwargs):
        if self.record_past or must_copy(key_states):
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = self.join(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        kept = self.sliding_window - 1  # what the next token sees beside itself
        self.keys, self.values = self.growing_keys.keep(kept), self.growing_values.keep(kept)
        return keys, values


class GrowingHybridLayer(GrowingLayer, LinearAttentionAndFullAttentionLayer):
    """With the state of a convolution, where smear keeps the last embedding."""


class GrowingHybridSlidingWindowLayer(GrowingSlidingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer):
    """The same with a window."""


GROWING = {
    DynamicLayer: GrowingLayer,
    DynamicSlidingWindowLayer: GrowingSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer: GrowingHybridLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: GrowingHybridSlidingWindowLayer,
}


def must_copy(states: torch.Tensor) -> bool:
    """Whether writing in place would break a graph: of compiled code, or of gradients."""
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and states.requires_grad)


def grow_in_place(cache: Cache) -> None:
    """Turn a cache's dynamic layers into growing ones; others stay as they are, and so do all of an offloaded cache
    and, while code is compiled, of any."""
    if torch.compiler.is_compiling() or cache.offloading:
        return
    for i, layer in enumerate(cache.layers):
        if type(layer) in GROWING:
            cache.layers[i] = GROWING[type(layer)].take_over(layer)
