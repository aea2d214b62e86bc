"""Attention: blocks of queries against the obvious twin, every implementation against every other, and the choice."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations import flash_attention
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_DEVICES
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_nanochat import NanoChatGPTForCausalLM, choose_attention
from modeling_nanochat.attention_choice import attention_candidates
from modeling_nanochat.block_attention import BLOCK_ATTENTION, block_attention, block_attention_backward
from tests.toys import drawn_model


def obvious_attention(query, key, value, window):
    """(B, H, T, D) -> (B, T, H, D) with a mask over all pairs."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    positions = torch.arange(query.shape[2])
    distance = positions[:, None] - positions
    scores = (query @ key.transpose(2, 3)).masked_fill((distance < 0) | (distance >= window), float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def random_inputs(length, heads=4, key_heads=2, head_dim=8, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = ((2, heads, length, head_dim), (2, key_heads, length, head_dim), (2, key_heads, length, head_dim))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("length, window", [(1, 1), (64, 64), (100, 100), (130, 65), (200, 1), (300, 128), (700, 257)])
def test_blocks_equal_the_obvious_attention(length, window):
    inputs = random_inputs(length)
    expected = obvious_attention(*inputs, window)
    output, _ = block_attention(*inputs, window, True)
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
    torch.library.opcheck(block_attention, (*(x.clone().requires_grad_() for x in inputs), 33, True))
    output, kept = block_attention(*inputs, 33, True)
    assert output.is_contiguous()
    arguments = (torch.randn_like(output), *inputs, kept, 33)
    torch.library.opcheck(block_attention_backward, arguments)
    assert all(grad.is_contiguous() for grad in block_attention_backward(*arguments))


def tiny_model(era, attn_implementation):
    return drawn_model(
        4, 0.3, seed=1, vocab_size=64, head_dim=16, max_position_embeddings=32, era=era,
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, sliding_window=17,
        attn_implementation=attn_implementation,
    )  # fmt: skip


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
            *(x.transpose(1, 2) for x in (query * softmax_scale, key, value)), sliding_window or query_length
        )

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", flash)
    ids = torch.randint(0, 64, (2, 50), generator=torch.Generator().manual_seed(0))
    model = tiny_model("seed", "sdpa").eval()
    expected = model(ids).logits
    model.config._attn_implementation_internal = "flash_attention_2"  # setting the name itself demands a GPU
    torch.testing.assert_close(model(ids).logits, expected, rtol=2e-4, atol=2e-5)
    assert windows == [17, 17, 17, None]


def register_stand_ins():
    """Kernels with the faults that kernels have: they fail when called, have no windows, or no backward pass."""

    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image is available\nfor execution")

    def windowless(module, query, key, value, attention_mask, scaling=None, **kwargs):
        return obvious_attention(query * scaling, key, value, query.shape[2]), None

    def forward_only(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
        inputs = (x.detach() for x in (query * scaling, key, value))
        return obvious_attention(*inputs, sliding_window or query.shape[2]), None

    for kernel in (broken, windowless, forward_only):
        AttentionInterface.register(kernel.__name__, kernel)


def test_the_choice_tries_the_kernel_and_says_why():
    register_stand_ins()
    model = tiny_model("seed", None)
    assert model.config._attn_implementation == ("sdpa" if torch.cuda.is_available() else BLOCK_ATTENTION)
    sentence = choose_attention(model, training=True, candidates=["broken", "windowless", "forward_only", "sdpa"])
    assert model.config._attn_implementation == "sdpa"
    assert sentence.startswith(
        "Attention: sdpa on cpu, because broken failed (RuntimeError: no kernel image is available)"
    )
    assert "windowless failed (ValueError: its output is not SDPA's, off by" in sentence
    assert "forward_only failed (RuntimeError" in sentence
    assert "window_pattern L trains faster" in sentence
    with pytest.raises(ValueError, match="tried \\['broken'\\]"):
        choose_attention(model, candidates=["broken"])


def test_inference_asks_for_no_backward_pass():
    register_stand_ins()
    model = tiny_model("head", "sdpa").eval()
    with torch.no_grad():
        assert choose_attention(model, candidates=["forward_only"]) == "Attention: forward_only on cpu."
    assert choose_attention(model, candidates=["windowless", "sdpa"]).endswith("of it).")  # nothing of training
    plain = tiny_model("launch", "sdpa")
    assert choose_attention(plain, candidates=["windowless", "sdpa"]) == "Attention: windowless on cpu."


def test_a_choice_leaves_model_and_random_state_alone(monkeypatch):
    """A fresh network too, whose attention adds nothing yet; and one dtype is tried, that of the activations."""
    register_stand_ins()
    model = NanoChatGPTForCausalLM(tiny_model("seed", None).config)
    model.set_activation_dtype(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    sentence = choose_attention(model, training=True, candidates=["windowless", BLOCK_ATTENTION])
    assert torch.rand(1).equal(expected)
    assert sentence.startswith(f"Attention: {BLOCK_ATTENTION} on cpu, because windowless failed")
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())

    def no_trial(*args):
        raise AssertionError("a trial where there is nothing to choose")

    monkeypatch.setattr("modeling_nanochat.attention_choice.Trial", no_trial)
    assert choose_attention(model, training=True) == f"Attention: {BLOCK_ATTENTION} on cpu."


@pytest.mark.parametrize(
    "device, capability, hip, training, expected",
    [
        ("cuda", (10, 0), None, True, ["flash_attention_4", "flash_attention_2", "flex_attention", "sdpa"]),
        ("cuda", (9, 0), None, True, [f"flash_attention_{n}" for n in (3, 4, 2)] + ["flex_attention", "sdpa"]),
        ("cuda", (9, 0), None, False, [*(f"flash_attention_{n}" for n in (3, 4, 2)), "sdpa"]),
        ("cuda", (8, 9), None, True, ["flash_attention_2", "flex_attention", "sdpa"]),
        ("cuda", (7, 5), None, False, ["sdpa"]),
        ("cuda", (9, 4), "6.2", True, ["flash_attention_2", "flex_attention", "sdpa"]),
        ("mps", None, None, True, ["kernels-community/metal-flash-sdpa", "sdpa"]),
        ("cpu", None, None, True, [BLOCK_ATTENTION]),
    ],
)
def test_candidates(monkeypatch, device, capability, hip, training, expected):
    """All are names that Transformers knows, or its kernels on the Hub for that device."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert list(attention_candidates(torch.device(device), windowed=True, training=training)) == expected
    for name in expected:
        assert name in ALL_ATTENTION_FUNCTIONS.valid_keys() or device in FLASH_ATTN_KERNEL_DEVICES[name]
