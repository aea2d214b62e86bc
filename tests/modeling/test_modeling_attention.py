"""Attention: blocks of queries against the obvious twin, every implementation against every other, and the choice."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations import flash_attention

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM, choose_attention
from modeling_nanochat.block_attention import BLOCK_ATTENTION, block_attention, block_attention_backward


def obvious_attention(query, key, value, scaling, window):
    """(B, H, T, D) -> (B, T, H, D) with a mask over all pairs."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    positions = torch.arange(query.shape[2])
    distance = positions[:, None] - positions
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill((distance < 0) | (distance >= window), float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def random_inputs(length, heads=4, key_heads=2, head_dim=8, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = ((2, heads, length, head_dim), (2, key_heads, length, head_dim), (2, key_heads, length, head_dim))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("length, window", [(1, 1), (64, 64), (100, 100), (130, 65), (200, 1), (300, 128), (700, 257)])
def test_blocks_equal_the_obvious_attention(length, window):
    inputs = random_inputs(length)
    expected = obvious_attention(*inputs, 0.3, window)
    output, _ = block_attention(*inputs, 0.3, window, True)
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(expected)
    for ours, theirs in zip(torch.autograd.grad(output, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads_first", [True, False])
def test_blocks_are_well_formed_operators(batch, heads_first):
    """Shapes and strides without running, no aliasing, autograd as registered: what torch.compile and export rely on.

    In the network heads lie behind tokens, and a single row of them can be viewed where two must be copied.
    """
    inputs = [x.detach()[:batch] for x in random_inputs(128, dtype=torch.float32)]
    if not heads_first:
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    torch.library.opcheck(block_attention, (*(x.clone().requires_grad_() for x in inputs), 0.3, 33, True))
    output, kept = block_attention(*inputs, 0.3, 33, True)
    assert output.is_contiguous()
    arguments = (torch.randn_like(output), *inputs, output, kept, 0.3, 33)
    torch.library.opcheck(block_attention_backward, arguments)
    assert all(grad.is_contiguous() for grad in block_attention_backward(*arguments))


def tiny_model(era, attn_implementation):
    torch.manual_seed(1)
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 17}
    config = NanoChatGPTConfig.from_depth(4, vocab_size=64, head_dim=16, max_position_embeddings=32, era=era, **shape)
    config._attn_implementation = attn_implementation
    model = NanoChatGPTForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def losses_and_gradients(model, ids):
    loss = model(ids[:, :-1], shift_labels=ids[:, 1:]).loss
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("era", ["seed", "head"])
@pytest.mark.parametrize(
    "implementation", ["eager", BLOCK_ATTENTION, pytest.param("flex_attention", marks=pytest.mark.slow)]
)
def test_implementations_agree(era, implementation):
    ids = torch.randint(0, 64, (2, 71), generator=torch.Generator().manual_seed(0))
    expected = losses_and_gradients(tiny_model(era, "sdpa"), ids)
    model = tiny_model(era, implementation)
    assert model.config._attn_implementation == implementation
    if implementation == "flex_attention":  # its CPU kernel has no backward pass
        with torch.no_grad():
            torch.testing.assert_close(model(ids[:, :-1], shift_labels=ids[:, 1:]).loss, expected[0])
        return
    for ours, theirs in zip(losses_and_gradients(model, ids), expected):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


def test_flash_kernels_get_the_window_that_sdpa_masks(monkeypatch):
    """FlashAttention needs a GPU: a stand-in with its contract (a query sees sliding_window keys, itself included)."""
    windows = []

    def flash(query, key, value, mask, query_length, is_causal, sliding_window=None, softmax_scale=None, **kwargs):
        windows.append(sliding_window)
        assert mask is None and is_causal
        return obvious_attention(
            *(x.transpose(1, 2) for x in (query, key, value)), softmax_scale, sliding_window or query_length
        )

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", flash)
    ids = torch.randint(0, 64, (2, 50), generator=torch.Generator().manual_seed(0))
    model = tiny_model("seed", "sdpa").eval()
    expected = model(ids).logits
    model.config._attn_implementation_internal = "flash_attention_2"  # setting the name itself demands a GPU
    torch.testing.assert_close(model(ids).logits, expected, rtol=2e-4, atol=2e-5)
    assert windows == [17, 17, 17, None]


def test_the_choice_tries_the_kernel_and_says_why():
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image is available\nfor execution")

    AttentionInterface.register("broken_kernel", broken)
    model = tiny_model("seed", None)
    assert model.config._attn_implementation == ("sdpa" if torch.cuda.is_available() else BLOCK_ATTENTION)
    sentence = choose_attention(model, ["broken_kernel", "sdpa"])
    assert model.config._attn_implementation == "sdpa"
    assert "broken_kernel failed (RuntimeError: no kernel image is available)" in sentence
    assert "window_pattern L" in sentence
    with pytest.raises(ValueError, match="tried \\['broken_kernel'\\]"):
        choose_attention(model, ["broken_kernel"])
    assert choose_attention(model.cpu()) == f"Attention: {BLOCK_ATTENTION} on cpu."
    assert all(parameter.grad is None for parameter in model.parameters())
