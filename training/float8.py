"""Matrix products of the blocks in float8, for pretraining on GPUs that multiply it at twice bfloat16's rate.

Every product of a Linear, forward and both backward, gets its operands scaled so that the largest value of the whole
tensor becomes the largest that the format has ("tensorwise"): float8_e4m3fn, which has the digits, for inputs and
weights, float8_e5m2, which has the range, for gradients. Sums are float32, results have the dtype of the activations.
Weights stay float32 outside, evaluation stays bfloat16.

Queries, keys, values, outputs and the MLP are multiplied so. The gates are too small (their sides are no multiples of
16), and the head stays bfloat16: its loss makes its own products, and upstream, whose float8 has the head in it, found
1% there (dev/LOG.md of github.com/karpathy/nanochat, 2026-01-13). The price: a step learns a little less, and passes
over memory for the scales, which below some width cost more than the products save; upstream found depth 12 slower and
depth 26 a sixth faster. They pay only where they are compiled into the kernels around them. On a CPU all of it is
emulated, which is how it is tested; **it was never run on a GPU**.
"""

import torch
from torch import Tensor

from modeling_nanochat.decoder_layer import CastLinear

MULTIPLE = 16  # of both sides of a weight, for the kernel
SMALLEST = 1e-12  # largest values below this count as this: a tensor of zeros has a scale too


def scaled(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in a float8 dtype, its largest value at the dtype's largest, and what to multiply it by to have it back."""
    most = torch.finfo(dtype).max
    inverse = x.abs().amax().float().clamp(min=SMALLEST) / most  # ()
    return (x.float() / inverse).clamp(-most, most).to(dtype), inverse


def product(
    left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """(m, k) @ (k, n) of scaled pairs: the kernel wants the left in rows and the right in columns."""
    (a, a_inverse), (b, b_inverse) = left, right
    multiply = emulated_mm if a.device.type == "cpu" else torch._scaled_mm
    return multiply(
        a.contiguous(),
        b.t().contiguous().t(),
        scale_a=a_inverse,
        scale_b=b_inverse,
        out_dtype=dtype,
        use_fast_accum=fast,
    )


def emulated_mm(
    a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, use_fast_accum: bool
) -> Tensor:
    """`torch._scaled_mm` in float32, for CPUs, where PyTorch's own takes seconds."""
    return ((a.float() @ b.float()) * (scale_a * scale_b)).to(out_dtype)


class Float8Linear(CastLinear):
    """A Linear that trains in float8 and evaluates as it did before."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return Float8Product.apply(x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


class Float8Product(torch.autograd.Function):
    """x (n, k) @ weight (m, k).T, and its gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        x8, weight8 = scaled(x, torch.float8_e4m3fn), scaled(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(*x8, *weight8)
        ctx.weight_dtype = weight.dtype
        return product(x8, (weight8[0].t(), weight8[1]), x.dtype, fast=True)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, x_inverse, weight, weight_inverse = ctx.saved_tensors
        values, inverse = scaled(grad, torch.float8_e5m2)  # (n, m)
        x_grad = product((values, inverse), (weight, weight_inverse), grad.dtype)
        weight_grad = product((values.t(), inverse), (x, x_inverse), grad.dtype)
        return x_grad, weight_grad.to(ctx.weight_dtype)


def multiply_in_float8(model: torch.nn.Module) -> int:
    """Let the casting Linears of a network's blocks, those whose sides allow it, train in float8; how many do.

    Raises:
        ValueError: none does.
    """
    changed = 0
    for layer in model.model.layers:
        for module in layer.modules():
            if type(module) is CastLinear and all(side % MULTIPLE == 0 for side in module.weight.shape):
                module.__class__ = Float8Linear
                changed += 1
    if not changed:
        raise ValueError(f"fp8 with blocks {model.config.hidden_size} wide; expected a multiple of {MULTIPLE}")
    return changed
