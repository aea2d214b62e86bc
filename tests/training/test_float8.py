"""Float8 products against slow twins, on the CPU; a network learns by them as in bfloat16; where there are none."""

import pytest
import torch

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.decoder_layer import CastLinear
from modeling_nanochat.training import devices, float8
from modeling_nanochat.training.float8 import Float8Linear, Float8Product, emulated_mm, multiply_in_float8, scaled
from modeling_nanochat.training.optimizer.groups import build_param_groups
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW
from modeling_nanochat.training.trainers.pretrain import PretrainConfig

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def twin(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x as float8 has it, in float64, value by value: the nearest of the format's values times the scale."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    values = values[values.isfinite()].unique()
    scale = x.abs().max().double() / values.max()
    nearest = (x.double().flatten()[:, None] / scale - values).abs().argmin(1)
    return (values[nearest] * scale).view(x.shape)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_scaling_takes_the_nearest_value(dtype):
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)) * 1e-3
    values, inverse = scaled(x, dtype)
    assert values.dtype == dtype and values.double().abs().max() == torch.finfo(dtype).max
    assert (values.double() * inverse - twin(x, dtype)).abs().max() < 0.04 * x.abs().max()  # ties go to even values
    assert (values.double() * inverse - twin(x, dtype)).abs().mean() < 1e-3 * x.abs().max()
    zeros, inverse = scaled(torch.zeros(2, 2), dtype)
    assert not zeros.float().any() and inverse > 0


def test_products_equal_a_slow_twins():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 32, generator=generator, requires_grad=True)
    weight = torch.randn(64, 32, generator=generator, requires_grad=True)
    grad = torch.randn(48, 64, generator=generator) * 1e-6
    y = Float8Product.apply(x, weight)
    y.backward(grad)
    with torch.no_grad():
        x8, weight8, grad8 = twin(x, E4M3), twin(weight, E4M3), twin(grad, E5M2)
    for found, expected, exact in (
        (y, x8 @ weight8.T, x @ weight.T),
        (x.grad, grad8 @ weight8, grad @ weight),
        (weight.grad, grad8.T @ x8, grad.T @ x),
    ):
        assert (found - expected).norm() < 1e-3 * expected.norm()
        assert 0.01 < (found - exact).norm() / exact.norm() < 0.1  # and that is not what bfloat16 would give


def network(depth: int = 2) -> NanoChatGPTForCausalLM:
    torch.manual_seed(0)
    config = NanoChatGPTConfig.from_depth(
        depth, era="head", vocab_size=256, head_dim=32, aspect_ratio=64 // depth, max_position_embeddings=64
    )
    model = NanoChatGPTForCausalLM(config).train()
    model.set_activation_dtype(torch.bfloat16)
    return model


def test_blocks_in_which_float8_would_do_nothing_are_refused():
    config = NanoChatGPTConfig.from_depth(1, vocab_size=64, head_dim=40, aspect_ratio=40, max_position_embeddings=16)
    with pytest.raises(ValueError, match="fp8 with blocks 40 wide; expected a multiple of 16"):
        multiply_in_float8(NanoChatGPTForCausalLM(config))


def test_which_linears_are_changed():
    model = network()
    assert multiply_in_float8(model) == 2 * 6
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert kinds["lm_head"] is CastLinear and kinds["model.layers.1.self_attn.value_gate"] is CastLinear
    assert kinds["model.layers.0.mlp.up_proj"] is Float8Linear
    ids = torch.arange(64).view(1, 64)
    with torch.no_grad():  # evaluation is as before
        assert torch.equal(model.eval()(ids).logits, network().eval()(ids).logits)


def test_the_kernel_gets_what_it_wants_and_computes_the_same(monkeypatch):
    """cuBLAS takes rows on the left, columns on the right, sides that are multiples of 16; PyTorch's own, here, all."""
    calls = []

    def kernel(a, b, **settings):
        assert a.stride(1) == 1 and b.stride(0) == 1 and not any(side % 16 for side in (*a.shape, *b.shape))
        calls.append((a.dtype, b.dtype, settings["use_fast_accum"]))
        found = torch._scaled_mm(a, b, **settings)
        torch.testing.assert_close(found, emulated_mm(a, b, **settings))
        return found

    monkeypatch.setattr(float8, "emulated_mm", kernel)
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(48, 64, requires_grad=True)
    Float8Product.apply(x, weight).backward(torch.randn(48, 32, dtype=torch.bfloat16).t())
    assert calls == [(E4M3, E4M3, True), (E5M2, E4M3, False), (E5M2, E4M3, False)]
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.slow
def test_a_network_learns_as_in_bfloat16():
    """200 steps on a language in which the next word depends on the last one."""
    generator = torch.Generator().manual_seed(0)
    chances = (2 * torch.randn(64, 64, generator=generator)).softmax(-1)
    words = [torch.randint(64, (200 * 8,), generator=generator)]
    for _ in range(32):
        words.append(torch.multinomial(chances[words[-1]], 1, generator=generator).squeeze(1))
    batches = torch.stack(words, 1).view(200, 8, 33)

    def losses(in_float8: bool) -> torch.Tensor:
        model = network(depth=1)
        if in_float8:
            multiply_in_float8(model)
        groups = build_param_groups(model, era="head", batch_tokens=2**17, weight_decay=0.1, polar_dtype="float32")
        optimizer, found = MuonAdamW(groups), []
        for batch in batches:
            loss = model(input_ids=batch[:, :-1], labels=batch[:, 1:], shift_labels=batch[:, 1:]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        return torch.stack(found)

    bfloat16, eight = losses(False), losses(True)
    assert bfloat16[0] > 5 and bfloat16[-50:].mean() < 3.3
    assert (eight[-50:].mean() - bfloat16[-50:].mean()).abs() < 0.01


def test_it_is_refused_where_the_device_cannot(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"fp8 needs a GPU that multiplies float8 .* 8\.9 .*; this is cpu"):
        PretrainConfig(output_dir=str(tmp_path), use_cpu=True, fp8=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not devices.native_float8("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert devices.native_float8("cuda")
