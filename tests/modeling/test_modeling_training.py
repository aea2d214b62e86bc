"""What a training step relies on: the chunked loss, dtypes, checkpointing, compilation, and fresh weights."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM, choose_attention, chunked_cross_entropy
from tests.toys import drawn_model

SMALL = {"vocab_size": 96, "head_dim": 16, "max_position_embeddings": 32}


def tiny_model(era="seed", depth=3, **settings):
    """Every matrix and the smear's weight drawn, so that no gradient is zero because another tensor is."""
    return drawn_model(depth, 0.2, lambda name, p: p.ndim == 2 or "smear" in name, era=era, **SMALL, **settings)


def rows(batch=2, length=40, vocab_size=96):
    return torch.randint(0, vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(model, ids, compiled=None):
    forward = model if compiled is None else compiled
    loss = forward(input_ids=ids[:, :-1], shift_labels=ids[:, 1:].contiguous()).loss
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def naive_loss(hidden, weight, targets, softcap, num_items=None):
    logits = softcap * torch.tanh((hidden @ weight.to(hidden.dtype).T).float() / softcap)
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return loss / (num_items or (targets != -100).sum())


@pytest.mark.parametrize("num_items", [None, 50])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_chunked_loss_equals_the_naive_one(monkeypatch, dtype, tolerance, num_items):
    monkeypatch.setitem(chunked_cross_entropy.CHUNK_ELEMENTS, "cpu", 64 * 96)
    torch.manual_seed(0)
    hidden = torch.randn(200, 32, dtype=dtype, requires_grad=True)  # four chunks, the last one smaller
    weight = torch.randn(96, 32, requires_grad=True)
    targets = torch.randint(0, 96, (200,)).masked_fill(torch.rand(200) < 0.2, -100)
    ours = chunked_cross_entropy.chunked_cross_entropy(hidden, weight, targets, 5.0, num_items)
    theirs = naive_loss(hidden, weight, targets, 5.0, num_items)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
    for a, b in zip(torch.autograd.grad(3 * ours, (hidden, weight)), torch.autograd.grad(3 * theirs, (hidden, weight))):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= tolerance * b.norm()
    with torch.no_grad():
        evaluated = chunked_cross_entropy.chunked_cross_entropy(hidden, weight, targets, 5.0, num_items)
    torch.testing.assert_close(evaluated, ours)


def test_rows_without_a_target_cost_nothing():
    model = tiny_model()
    ids = rows()[:, :-1]
    loss = model(ids, shift_labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss == 0
    assert all(parameter.grad.abs().max() == 0 for parameter in model.parameters())


def test_labels_shift_and_shift_labels_do_not():
    model = tiny_model().eval()
    ids = rows()
    logits = model(ids).logits
    inner = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=ids).loss, inner)
    every = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(model(ids[:, :-1], shift_labels=ids[:, 1:]).loss, every.mean())
    torch.testing.assert_close(model.token_losses(ids[:, :-1], ids[:, 1:]).flatten(), every)
    torch.testing.assert_close(model(ids, labels=ids).logits, logits)  # for an evaluation's metrics
    assert model.train()(ids, labels=ids).logits is None
    torch.testing.assert_close(model(ids, labels=ids, logits_to_keep=0).logits, logits)


@pytest.mark.parametrize("era", ["seed", "head"])
def test_weighted_loss(era):
    """Its value and gradients are those of the logits of every position, padded rows and rows without weight included;
    neither is read, and the head only sees the positions of non-zero weight."""
    model, ids = tiny_model(era), rows(batch=4, length=20)
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones_like(ids[:, :-1])
    mask[0, :6] = mask[2, :3] = mask[2, 17:] = 0  # on the left; on both sides
    weights = torch.randn(4, 20, generator=generator) * (torch.rand(4, 20, generator=generator) < 0.3) * mask
    weights[3] = 0
    log_probabilities = model(ids[:, :-1], attention_mask=mask).logits.log_softmax(-1)
    expected = -(weights * log_probabilities.gather(-1, ids[:, 1:, None]).squeeze(-1)).sum()
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))

    read = []
    model.model.register_forward_pre_hook(lambda module, args: read.append(args[0].shape))
    shuffled = torch.where(mask == 1, ids[:, :-1], 95)  # what padding holds makes no difference
    loss = model.weighted_loss(shuffled, ids[:, 1:], weights, mask)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), expected_gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert read == [(3, 20)]
    with torch.no_grad():
        torch.testing.assert_close(model.weighted_loss(shuffled, ids[:, 1:], weights, mask), loss.detach())
    model.weighted_loss(shuffled[2:3], ids[2:3, 1:], weights[2:3], mask[2:3])
    assert read[-1] == (1, 14)
    with pytest.raises(ValueError, match="weights are not 0 where attention_mask is"):
        model.weighted_loss(shuffled, ids[:, 1:], torch.ones_like(weights), mask)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_of_a_step_is_as_large_as_the_logits(monkeypatch):
    monkeypatch.setitem(chunked_cross_entropy.CHUNK_ELEMENTS, "cpu", 64 * 4096)
    model = NanoChatGPTForCausalLM(NanoChatGPTConfig.from_depth(1, **SMALL))
    model.resize_token_embeddings(4096, mean_resizing=False)
    ids = rows(batch=8, length=64, vocab_size=4096)
    with LargestTensor() as largest:
        loss_and_gradients(model, ids)
        model.token_losses(ids[:, :-1], ids[:, 1:])
    assert largest.elements <= 64 * 4096  # a chunk, or a weight; the logits would be 8 x 64 x 4096


@pytest.mark.parametrize("era", ["seed", "head"])
def test_bfloat16_activations_on_float32_weights(era):
    model = tiny_model(era)
    ids, config_before = rows(), copy.deepcopy(model.config)
    loss, gradients = loss_and_gradients(model, ids)
    model.set_activation_dtype(torch.bfloat16)
    assert model.model(ids).last_hidden_state.dtype == torch.bfloat16
    half_loss, half_gradients = loss_and_gradients(model, ids)
    torch.testing.assert_close(half_loss, loss, rtol=5e-3, atol=0)
    for parameter, full, half in zip(model.parameters(), gradients, half_gradients):
        assert half.dtype == parameter.dtype == torch.float32
        assert (half - full).norm() < 0.1 * full.norm() + 1e-4
    assert model.config == config_before


@pytest.mark.parametrize("era", ["launch", "seed", "head"])
def test_gradient_checkpointing_changes_nothing(era):
    model = tiny_model(era).train()
    expected = loss_and_gradients(model, rows())
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(loss_and_gradients(model, rows()), expected)


@pytest.mark.parametrize("era, implementation", [("head", "nanochat_block"), ("seed", "sdpa")])
def test_the_training_forward_is_one_graph_for_all_steps(era, implementation):
    """No graph break, no recompilation when weights and tokens change, and the numbers are eager's."""
    torch._dynamo.reset()
    model = tiny_model(era, depth=2)
    choose_attention(model, training=True, candidates=[implementation])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    for step in range(2):
        ids = (rows() + step) % 96
        expected = loss_and_gradients(model, ids)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            ours = loss_and_gradients(model, ids, compiled)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), expected[1]):
                parameter -= 0.1 * gradient


@pytest.mark.slow
def test_generated_kernels_equal_eager():
    """The one test that runs the compiler's own kernels, in the dtypes of a real run: bfloat16 on float32 weights."""
    torch._dynamo.reset()
    model = tiny_model("head", depth=2)
    model.set_activation_dtype(torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    loss, gradients = loss_and_gradients(model, rows())
    compiled_loss, compiled_gradients = loss_and_gradients(model, rows(), compiled)
    torch.testing.assert_close(compiled_loss, loss, rtol=2e-3, atol=0)
    total = torch.stack([gradient.norm() for gradient in gradients]).norm()
    for ours, theirs in zip(compiled_gradients, gradients):
        assert (ours - theirs).norm() < 0.05 * theirs.norm() + 1e-3 * total


def expected_statistics(config) -> dict:
    """What the initialisation of an era says of a tensor: (lowest, highest, standard deviation), None if unbounded."""
    head = config.init_scheme == "head"
    bound = (3 / config.hidden_size) ** 0.5
    uniform = (-bound, bound, bound / 3**0.5)
    up = tuple(x * (0.4 if head else 1.0) for x in uniform)
    gate = (0.0, 0.02, 0.02 / 12**0.5) if head else (0.0, 0.0, 0.0)
    return {
        "embed_tokens": (None, None, 0.8 if head else 1.0), "lm_head": (None, None, 0.001),
        "q_proj": uniform, "k_proj": uniform, "v_proj": uniform, "value_embeddings": uniform, "up_proj": up,
        "o_proj": (0, 0, 0), "down_proj": (0, 0, 0), "value_gate": gate, "smear_gate": gate,
        "resid_lambdas": (1.05, 1.15, None) if head else (1, 1, None),
        "x0_lambdas": (0.05, 0.2, None) if head else (0.1, 0.1, None),
        "smear_lambda": (0, 0, None), "backout_lambda": (0.2, 0.2, None),
    }  # fmt: skip


def from_constructor(config, tmp_path):
    return NanoChatGPTForCausalLM(config)


def from_meta_device(config, tmp_path):
    with torch.device("meta"):
        model = NanoChatGPTForCausalLM(config)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(7)
    model.init_weights()
    return model


def from_a_checkpoint_that_lacks_them(config, tmp_path):
    NanoChatGPTForCausalLM(config).save_pretrained(tmp_path)
    save_file({"lm_head.weight": load_file(tmp_path / "model.safetensors")["lm_head.weight"]},
              tmp_path / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    return NanoChatGPTForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("way_in", [from_constructor, from_meta_device, from_a_checkpoint_that_lacks_them])
@pytest.mark.parametrize("era", ["seed", "head"])
def test_fresh_weights(era, way_in, tmp_path):
    config = NanoChatGPTConfig.from_depth(4, era=era, **SMALL)
    model = way_in(config, tmp_path)
    statistics, seen = expected_statistics(config), set()
    for name, tensor in model.named_parameters():
        kind = next(kind for kind in statistics if kind in name)
        seen.add(kind)
        lowest, highest, deviation = statistics[kind]
        if lowest is not None:
            assert lowest - 1e-6 <= tensor.min() and tensor.max() <= highest + 1e-6, name
        if deviation and tensor.numel() > 200:
            assert tensor.std().item() == pytest.approx(deviation, rel=0.1), name
        if "lambdas" in kind and era == "head":
            assert torch.all(tensor.diff() < 0), name
    assert seen == set(statistics) - (set() if era == "head" else {"smear_gate", "smear_lambda", "backout_lambda"})
    torch.testing.assert_close(
        model.model.rotary_emb.inv_freq, config.rope_parameters["rope_theta"] ** -(torch.arange(0, 16, 2) / 16)
    )
