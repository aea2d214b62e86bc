"""Rows that decode together, of any lengths, and that join and leave while the others go on.

    rows, scores = RunningRows.read(model, prompts, pad)    # (B, V) scores of the tokens that follow the prompts
    while ...:
        scores = rows.append(draw(scores, uniforms))        # a token for each row -> scores of the next ones
        rows.select(kept)                                   # some leave (or are repeated)
        rows.join(others, free_slots)                       # some enter

All rows end in the same column, so that a step writes one column of the cache whatever the lengths are; shorter rows
are padded on the left and the mask hides it. Joining moves the states of the new rows only, as long as they are not
longer than the longest here. The price is that attention reads the width of the longest row for every row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from .inference import pad_left


class RunningRows:
    """Tokens and mask (B, W) of rows that a model has read, and its cache; used without gradients.

    Attributes:
        tokens: (B, W) int64, padded on the left.
        mask: (B, W) int64, 0 where padded.
        lengths: tokens of each row, on the host.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor, mask: Tensor):
        self.model, self.tokens, self.mask = model, tokens, mask
        self.lengths: list[int] = mask.sum(1).tolist()
        self.cache = DynamicCache(config=model.config)

    @classmethod
    def read(
        cls, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_token_id: int
    ) -> tuple["RunningRows", Tensor]:
        """Rows of these prompts (lists of token ids, none empty), and float32 scores (B, V) of what follows them."""
        rows = cls(model, *pad_left(prompts, pad_token_id, model.device))
        return rows, rows._forward(rows.tokens)

    def __len__(self) -> int:
        return len(self.lengths)

    def append(self, tokens: Tensor) -> Tensor:
        """Adds a token (B,) to each row; float32 scores (B, V) of the next one."""
        self.tokens = torch.cat([self.tokens, tokens[:, None]], dim=1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self), 1)], dim=1)
        self.lengths = [length + 1 for length in self.lengths]
        return self._forward(self.tokens[:, -1:])

    def _forward(self, tokens: Tensor) -> Tensor:
        mask = positions = None  # as the model makes them by itself
        if min(self.lengths, default=0) < self.tokens.shape[1]:
            mask, positions = self.mask, (self.mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = self.model(
            tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def select(self, indices: Tensor) -> None:
        """Keeps the rows (N,) named, in that order; a row may be named several times."""
        self.tokens, self.mask = self.tokens[indices], self.mask[indices]
        self.cache.reorder_cache(indices)
        self.lengths = [self.lengths[index] for index in indices.tolist()]
        self._set_width(max(self.lengths, default=0))

    def free(self, slot: int) -> None:
        """Forgets what a row has read: a slot to be taken by `join`. Until then it decodes tokens nobody reads."""
        self.mask[slot] = 0
        self.lengths[slot] = 0
        self._set_width(max(1, *self.lengths))

    def join(self, others: "RunningRows", slots: Sequence[int] = ()) -> None:
        """Takes in the rows of `others` (not to be used again): into the slots as far as they go, then at the end."""
        slots = list(slots)[: len(others)]
        width = max(self.tokens.shape[1], others.tokens.shape[1])
        self._set_width(width)
        others._set_width(width)
        self.tokens = put(self.tokens, others.tokens, slots)
        self.mask = put(self.mask, others.mask, slots)
        for slot, length in zip(slots, others.lengths):
            self.lengths[slot] = length
        self.lengths += others.lengths[len(slots) :]
        for layer, other in zip(self.cache.layers, others.cache.layers):
            layer.keys, layer.values = put(layer.keys, other.keys, slots), put(layer.values, other.values, slots)
            for index, state in getattr(layer, "conv_states", {}).items():  # the embedding that smear remembers
                layer.conv_states[index] = put(state, other.conv_states[index], slots)

    def _set_width(self, width: int) -> None:
        """Adds or cuts columns on the left, where there is nothing but padding."""
        if width == self.tokens.shape[1]:
            return
        self.tokens, self.mask = with_columns(self.tokens, width, 1), with_columns(self.mask, width, 1)
        for layer in self.cache.layers:
            kept = columns(layer, width)
            layer.keys, layer.values = with_columns(layer.keys, kept, 2), with_columns(layer.values, kept, 2)
            if layer.is_sliding:
                layer.cumulative_length = width


def columns(layer: CacheLayerMixin, width: int) -> int:
    """Columns that a layer keeps of a width: a window's own column comes with the next token."""
    return min(width, layer.sliding_window - 1) if layer.is_sliding else width


def with_columns(states: Tensor, width: int, dim: int) -> Tensor:
    """The states with `width` columns in dimension `dim`: cut (a view), or filled with zeros, on the left."""
    have = states.shape[dim]
    if width <= have:
        return states.narrow(dim, have - width, width)
    return F.pad(states, (0, 0) * (states.ndim - 1 - dim) + (width - have, 0))


def put(states: Tensor, new: Tensor, slots: list[int]) -> Tensor:
    """(B, ...) with the first rows of (N, ...) written in place into the slots, and the others behind."""
    if slots:
        states[slots] = new[: len(slots)]
    return torch.cat([states, new[len(slots) :]]) if len(slots) < len(new) else states


def draw(scores: Tensor, uniforms: Tensor) -> Tensor:
    """One token for each row of (B, V) scores: the first whose cumulated probability exceeds its number. (B,) int64"""
    cumulated = scores.float().softmax(dim=-1).cumsum(dim=-1)  # (B, V)
    total = cumulated[:, -1:]
    # Rounding may leave the total a little beside 1: the threshold stays below it, so a token is always found.
    threshold = torch.minimum(uniforms[:, None].float() * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, threshold, right=True).squeeze(1)
