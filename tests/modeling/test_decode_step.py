"""The lean step of decoding against the modules, whose work it does: same logits, same cache, and only where it may."""

import gc

import pytest
import torch
from transformers import DynamicCache

from modeling_nanochat import decode_step, modeling_nanochat_gpt
from modeling_nanochat.inference import cast_weights
from tests.toys import SHARP_VOCAB, sharp_model

NEW = 12  # tokens: the window of 9 fills on the way


@pytest.fixture
def steps(monkeypatch):
    """How many steps the lean way has made."""
    made = []
    step = decode_step.DecodeStep.__call__
    monkeypatch.setattr(decode_step.DecodeStep, "__call__", lambda *args: made.append(1) or step(*args))
    return made


def read(model, rows: int = 2, width: int = 5, padded: bool = False):
    """A cache that has read a prompt, and its mask; the last row begins two tokens later if padded."""
    ids = torch.randint(1, SHARP_VOCAB, (rows, width), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[-1, : 2 if padded else 0] = 0
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    return cache, mask


def decode(model, cache, mask, **options) -> torch.Tensor:
    """(B, NEW, V) logits of the same tokens whatever the logits are."""
    tokens = torch.randint(1, SHARP_VOCAB, (len(mask), NEW), generator=torch.Generator().manual_seed(1))
    logits = []
    for token in tokens.split(1, dim=1):
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        logits.append(model(token, attention_mask=mask, past_key_values=cache, **options).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [2, decode_step.FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("era", ["seed", "head"])
@torch.inference_mode()
def test_it_equals_the_modules(era, dtype, rows, padded, steps, monkeypatch):
    model = sharp_model(era)
    model.set_activation_dtype(dtype)
    (cache, mask), (expected_cache, _) = (read(model, rows, padded=padded) for _ in range(2))
    found = decode(model, cache, mask)
    assert len(steps) == NEW
    monkeypatch.setattr(modeling_nanochat_gpt, "step_for", lambda *args: None)
    expected = decode(model, expected_cache, mask)
    assert len(steps) == NEW
    model.set_activation_dtype(torch.float32)
    exact_cache, _ = read(model, rows, padded=padded)
    exact = decode(model, exact_cache, mask)
    assert off(found, exact) < 1.2 * off(expected, exact) + 1e-5  # in bfloat16 as far from float32 as the modules are
    for ours, theirs, exact in zip(cache.layers, expected_cache.layers, exact_cache.layers):
        assert ours.keys.shape == theirs.keys.shape
        assert off(ours.keys, exact.keys) < 1.2 * off(theirs.keys, exact.keys) + 1e-5


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("width", [5, 21])  # within the window of 9, and beyond it
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("era", ["seed", "head"])
@torch.no_grad()
def test_a_prompt_read_for_frozen_weights_equals_the_modules(era, dtype, width, padded, steps, monkeypatch):
    """Logits, cache, and what is decoded from it; of the last place as of all."""
    model = sharp_model(era)
    cast_weights(model, torch.float32)
    ids = torch.randint(1, SHARP_VOCAB, (2, width), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[-1, : 2 if padded else 0] = 0

    def run(dtype):
        model.set_activation_dtype(dtype)
        cache = DynamicCache(config=model.config)
        logits = model(ids, attention_mask=mask, past_key_values=cache).logits[mask.bool()]
        keys = [layer.keys[:1].clone() for layer in cache.layers]  # of the row without padding
        return torch.cat([logits, decode(model, cache, mask).flatten(0, 1)]), keys

    found, keys = run(dtype)
    assert len(steps) == 1 + NEW
    last = model(ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config), logits_to_keep=1).logits
    assert last.shape[1] == 1 and torch.allclose(last[0, 0], found[width - 1], atol=1e-2)
    monkeypatch.setattr(modeling_nanochat_gpt, "step_for", lambda *args: None)
    (expected, expected_keys), (exact, exact_keys) = run(dtype), run(torch.float32)
    assert off(found, exact) < 1.2 * off(expected, exact) + 1e-5
    for ours, theirs, exact in zip(keys, expected_keys, exact_keys):
        assert ours.shape == theirs.shape
        assert off(ours, exact) < 1.2 * off(theirs, exact) + 1e-5


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


class Adapted(torch.nn.Linear):
    """What an adapter or a quantised weight puts in a Linear's place."""

    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("case", ["adapter", "hook", "hidden states", "gradients", "several tokens"])
def test_everything_else_is_left_to_the_modules(case, steps):
    model = sharp_model("head")
    options = {}
    if case == "adapter":
        model.model.layers[1].self_attn.k_proj.__class__ = Adapted
    elif case == "hook":
        model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output + 1)
    elif case == "hidden states":
        options = {"output_hidden_states": True}
    with torch.set_grad_enabled(case == "gradients"):
        cache, mask = read(model)
        if case == "several tokens":
            cast_weights(model, torch.float32)
            model(mask[:, :2], past_key_values=cache)
            model(
                mask[:, :1].expand(-1, decode_step.LONGEST_PROMPT + 1),
                past_key_values=DynamicCache(config=model.config),
            )
            sharp_model("seed").requires_grad_(False)(mask, past_key_values=DynamicCache())  # its layers come with use
        else:
            decode(model, cache, mask, **options)
    assert not steps


@torch.no_grad()
def test_new_weights_decode_from_the_next_cache_on(steps):
    """Trained weights are taken anew for each cache; frozen ones are kept, but not if somebody changes them."""
    model = sharp_model("head")
    model.set_activation_dtype(torch.bfloat16)
    for freeze in (False, True):
        if freeze:
            cast_weights(model, torch.bfloat16)
        before = decode(model, *read(model))
        kept = decode_step.FROZEN.get(model.model)
        assert decode(model, *read(model)).equal(before)
        assert (kept is not None) == freeze and decode_step.FROZEN.get(model.model) is kept
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)
        assert not decode(model, *read(model)).equal(before)


@torch.no_grad()
def test_nothing_is_left_of_a_cache_or_a_network(steps):
    gc.collect()
    caches, networks = len(decode_step.STEPS), len(decode_step.FROZEN)
    model = sharp_model("seed")
    cast_weights(model, torch.float32)
    cache, mask = read(model)
    decode(model, cache, mask)
    assert (len(decode_step.STEPS), len(decode_step.FROZEN)) == (caches + 1, networks + 1)
    del cache, model
    gc.collect()
    assert (len(decode_step.STEPS), len(decode_step.FROZEN)) == (caches, networks)
