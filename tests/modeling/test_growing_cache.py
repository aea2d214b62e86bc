"""Caches that grow in place hold, at every moment, what the library's own hold."""

import copy
import random
from collections.abc import Callable

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from modeling_nanochat.growing_cache import GrowingLayer, GrowingSlidingWindowLayer, grow_in_place

BATCH, HEADS, SIZE, WINDOW = 3, 2, 4, 7


def two_caches() -> tuple[DynamicCache, DynamicCache]:
    """A growing cache and the library's, a full layer and a windowed one each."""
    caches = []
    for _ in range(2):
        cache = DynamicCache()
        cache.layer_class_to_replicate = None
        cache.layers = [DynamicLayer(), DynamicSlidingWindowLayer(WINDOW)]
        caches.append(cache)
    grow_in_place(caches[0])
    assert [type(layer) for layer in caches[0].layers] == [GrowingLayer, GrowingSlidingWindowLayer]
    return caches[0], caches[1]


def append(cache: DynamicCache, tokens: int, seed: int) -> list[torch.Tensor]:
    """What attention is handed when `tokens` more are read."""
    generator = torch.Generator().manual_seed(seed)
    batch = cache.layers[0].keys.shape[0] if cache.get_seq_length() else BATCH
    states = [torch.randn(batch, HEADS, tokens, SIZE, generator=generator) for _ in range(4)]
    return [*cache.update(states[0], states[1], 0), *cache.update(states[2], states[3], 1)]


def draw_change(kind: str, cache: DynamicCache, draw: random.Random) -> Callable[[DynamicCache], None]:
    batch = cache.layers[0].keys.shape[0]
    rows = torch.tensor([draw.randrange(batch) for _ in range(BATCH)])
    removed = -draw.randint(1, 3)
    if (kind == "crop" and not 3 < cache.get_seq_length() < WINDOW) or (kind == "repeat" and batch > 8):
        return lambda cache: None  # a full window cannot be cropped
    return {
        "reorder": lambda cache: cache.reorder_cache(rows),
        "repeat": lambda cache: cache.batch_repeat_interleave(2),
        "select": lambda cache: cache.batch_select_indices(rows),
        "crop": lambda cache: cache.crop(removed),
        "reset": lambda cache: cache.reset(),
    }[kind]


@pytest.mark.parametrize("seed", range(8))
def test_they_equal_the_library_s_after_any_operations(seed, monkeypatch):
    monkeypatch.setattr("modeling_nanochat.growing_cache.ROOM", 5)  # so that buffers run out
    growing, plain = two_caches()
    draw = random.Random(seed)
    for step in range(60):
        kind = draw.choice(["token"] * 8 + ["chunk", "reorder", "repeat", "select", "crop", "copy", "reset"])
        if kind in ("token", "chunk"):
            tokens = 1 if kind == "token" else draw.randint(2, 12)
            for ours, expected in zip(append(growing, tokens, step), append(plain, tokens, step)):
                assert ours.equal(expected), kind
        elif kind == "copy":
            old, growing = growing, copy.deepcopy(growing)
            append(old, 3, 0)  # what happens to the original is not seen in the copy
        elif growing.get_seq_length():
            change = draw_change(kind, growing, draw)
            for cache in (growing, plain):
                change(cache)
        for ours, expected in zip(growing.layers, plain.layers):
            assert ours.get_seq_length() == expected.get_seq_length()
            assert ours.get_mask_sizes(1) == expected.get_mask_sizes(1)
            if ours.get_seq_length():
                assert ours.keys.equal(expected.keys) and ours.values.equal(expected.values), kind


def test_a_token_copies_nothing_that_is_there():
    growing, _ = two_caches()
    append(growing, 4, 0)
    places = [layer.keys.untyped_storage().data_ptr() for layer in growing.layers]
    for step in range(20):
        append(growing, 1, step)
    assert [layer.keys.untyped_storage().data_ptr() for layer in growing.layers] == places


def test_gradients_and_inference_mode():
    """States that need gradients are joined as the library does; a buffer of inference mode is not written to later."""
    growing, _ = two_caches()
    keys = torch.randn(1, HEADS, 2, SIZE, requires_grad=True)
    for _ in range(2):
        joined, _ = growing.update(keys, keys, 0)
    (joined**2).sum().backward()
    assert keys.grad.equal(4 * keys)
    growing, plain = two_caches()
    with torch.inference_mode():
        append(growing, 4, 0)
        append(plain, 4, 0)
    with torch.no_grad():
        assert append(growing, 1, 1)[0].equal(append(plain, 1, 1)[0])
