"""What one optimizer step does to tensors: AdamW for any, Muon for stacks of matrices. Pure functions, in place.

Muon replaces a matrix's averaged gradient by the nearest orthogonal matrix (Polar Express), so that every direction is
learnt at the same pace; then it evens out rows (NorMuon) and decays only what the update shrinks anyway. All matrices
of one shape are stacked to (K, m, n): a few large batched products instead of many small ones, for the price of copying
the matrices into the stack and back. Everything around the products is elementwise, for torch.compile to fuse.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

# Polar Express, arXiv 2505.16932: the best odd quintic polynomials, one after another, to send all singular values to
# 1; computed for 5 iterations with safety 2e-2 and cushion 2. Columns a, b, c of X <- a X + (b A + c A^2) X, A = X X^T.
POLAR_EXPRESS_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# The Frobenius norm bounds the largest singular value; the margin is upstream's, smaller where rows are equilibrated.
NORM_SAFETY, EQUILIBRATED_NORM_SAFETY = 1.02, 1.01
# Iterations of long matrices before Gram matrices alone have digits enough for the others (`gram_factor`).
DIRECT_STEPS = {torch.float32: 0, torch.bfloat16: 3}


def adamw_update(
    parameters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step in place on tensors of any shapes: decay decoupled and first, both moments bias-corrected.

    `steps` counts the steps so far, 0-dim float32 on the device of the parameter. One pass over memory per tensor.
    """
    adam(
        parameters,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=True,
        decoupled_weight_decay=True,
        amsgrad=False,
        maximize=False,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
    )


def polar_express(x: Tensor, steps: int = 5, norm_safety: float = NORM_SAFETY) -> Tensor:
    """The orthogonal factor of each matrix's polar decomposition, roughly: all but tiny singular values end near 1.

    In bfloat16 the iteration is chaotic, so the order of its roundings is upstream's. Compiled code, which rounds as it
    fuses, and float32 go a shorter way: a X is left to the product, as a I in the polynomial, and the last iterations
    of long matrices (in float32 all) meet the Gram matrices alone. In bfloat16 random 256 x 1024 end 0.017 of their
    norm from the exact result so, in upstream's order 0.046.

    Args:
        x: (K, m, n), whose dtype is the precision of the products.
        steps: iterations, at most 5.
        norm_safety: how far below 1 the first norm is kept, against rounding.
    """
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * norm_safety + 1e-6)
    coefficients = POLAR_EXPRESS_COEFFICIENTS[:steps]
    if x.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
        return in_upstreams_order(x, coefficients)
    is_long = max(x.shape[-2:]) >= 2 * min(x.shape[-2:])
    direct = DIRECT_STEPS.get(x.dtype, steps) if is_long else steps
    for each in coefficients[:direct]:
        x = times(polynomial(gram_of(x), *each), x)
    return times(gram_factor(gram_of(x), coefficients[direct:]), x) if direct < steps else x


def in_upstreams_order(x: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """The iteration as upstream writes it. (K, m, n) -> (K, m, n)"""
    for a, b, c in coefficients:
        squares = gram_of(x)
        factor = b * squares + c * (squares @ squares)
        x = a * x + times(factor, x)
    return x


def gram_of(x: Tensor) -> Tensor:
    """(K, m, n) -> (K, s, s), s being the smaller side."""
    return x.mT @ x if x.size(-2) > x.size(-1) else x @ x.mT


def times(factor: Tensor, x: Tensor) -> Tensor:
    """The product on the smaller side. (K, s, s), (K, m, n) -> (K, m, n)"""
    return x @ factor if x.size(-2) > x.size(-1) else factor @ x


def polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """a I + b A + c A^2 of (K, s, s), never summed in bfloat16."""
    if gram.dtype != torch.bfloat16:
        result = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        result.diagonal(dim1=-2, dim2=-1).add_(a)
        return result
    identity = torch.eye(gram.size(-1), device=gram.device)
    return (b * gram.float() + c * (gram @ gram).float() + a * identity).to(gram.dtype)


def gram_factor(gram: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """The square factor F of Polar Express, whose result is F X (or X F), from the Gram matrices (K, s, s) alone.

    The polynomials of a symmetric matrix commute, so A = X X^T becomes Q A Q when X becomes Q X: no product has the
    long side, which saves 40% of five iterations at 1:4. Squaring loses digits of singular values under 1e-3 of the
    largest: the result is off by 6e-4 of its norm at worst in float32 (measured, spectra over 8 decades). In
    bfloat16 three iterations have to bring the singular values together first: the other two are then off by 3 to
    24% more than directly, but the last three by up to six times as much (measured, spectra over 0 to 5 decades).
    """
    factor = None
    for i, each in enumerate(coefficients):
        step = polynomial(gram, *each)  # Q
        factor = step if factor is None else factor @ step
        if i + 1 < len(coefficients):
            gram = step @ gram @ step
    return factor


def equilibrate_rows(x: Tensor) -> Tensor:
    """Give all rows of a matrix its root-mean-square row norm (arXiv 2603.28254). x: (K, m, n)."""
    row_norms = x.float().norm(dim=-1, keepdim=True)  # (K, m, 1)
    mean_norm = x.float().norm(dim=(-2, -1), keepdim=True) / math.sqrt(x.size(-2))  # (K, 1, 1)
    return x * (mean_norm / row_norms.clamp_min(1e-6)).to(x.dtype)


def orthogonalize(
    x: Tensor, ns_steps: int, polar_dtype: torch.dtype, row_equilibration: bool, frobenius_renormalization: bool
) -> Tensor:
    """Polar Express of (K, m, n) in `polar_dtype`, with the head era's options around it; returns float32."""
    x = x.to(polar_dtype)
    if row_equilibration:
        x = equilibrate_rows(x)
    x = polar_express(x, ns_steps, EQUILIBRATED_NORM_SAFETY if row_equilibration else NORM_SAFETY).float()
    if frobenius_renormalization:  # arXiv 2602.21545
        target = math.sqrt(min(x.size(-2), x.size(-1)))
        x = x * (target / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-6))
    return x


def reduce_variance(x: Tensor, second_moment: Tensor, beta2: float | Tensor) -> Tensor:
    """Even out the scale of rows (or, of wide matrices, columns) by their running second moment, which is updated in
    place; the Frobenius norm stays (NorMuon, arXiv 2510.05491).

    Args:
        x: (K, m, n).
        second_moment: (K, m, 1) if m >= n, else (K, 1, n).
    """
    dim = -1 if x.size(-2) >= x.size(-1) else -2
    mean_square = x.square().mean(dim, keepdim=True)  # the shape of second_moment
    second_moment.lerp_(mean_square.to(second_moment.dtype), 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    norm = mean_square.sum(dim=(-2, -1), keepdim=True).sqrt()  # (K, 1, 1), both norms over sqrt of the averaged size
    scaled_norm = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return x * (scale * (norm / scaled_norm.clamp_min(1e-10)))


def muon_update(
    parameters: Tensor,
    grads: Tensor,
    momentum_buffer: Tensor,
    second_moment: Tensor,
    orthogonalize: Callable[..., Tensor] = orthogonalize,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    beta2: float | Tensor,
    weight_decay: float | Tensor,
    ns_steps: int = 5,
    polar_dtype: torch.dtype = torch.bfloat16,
    row_equilibration: bool = False,
    frobenius_renormalization: bool = False,
) -> None:
    """One Muon step in place on K matrices of one shape: Nesterov momentum, orthogonalisation, variance reduction, and
    decay only where it agrees with the update's direction (arXiv 2510.12402).

    Upstream's seed era keeps the update in `polar_dtype` to the end; here it is float32 after the orthogonalisation.

    Args:
        parameters, grads, momentum_buffer: (K, m, n).
        second_moment: (K, m, 1) if m >= n, else (K, 1, n).
        orthogonalize: what takes its place where the matrices are not whole.
        lr, momentum, beta2, weight_decay: numbers, or 0-dim tensors so that compiled code serves all values; momentum
            and beta2 then in the dtype of the buffers. The rate is further times sqrt(max(1, m / n)).
    """
    momentum_buffer.lerp_(grads, 1 - momentum)
    nesterov = grads.lerp(momentum_buffer, momentum)
    update = orthogonalize(nesterov, ns_steps, polar_dtype, row_equilibration, frobenius_renormalization)
    update = reduce_variance(update, second_moment, beta2)
    decay = weight_decay * torch.where(update * parameters >= 0, parameters, 0.0)
    rate = lr * math.sqrt(max(1.0, parameters.size(-2) / parameters.size(-1)))
    parameters.sub_(rate * (update + decay))
