"""Cross entropy of a soft-capped head, a chunk of tokens at a time.

The float32 logits of a whole batch (tokens x vocabulary) are the largest tensor of a training step, and four passes
over them cost as much time as the head's matrix product. Here the head, the cap, the loss and its gradients are worked
out for one chunk before the next one begins: the gradients of the hidden states and of the head are made in the
forward pass, while a chunk's probabilities are at hand (3 matrix products instead of the 4 of a recomputation).
The costs: the weight of every token must be known in advance, and the head's gradient lives through the backward pass.
"""

import torch

IGNORE_INDEX = -100  # PyTorch's and Transformers' mark of a target without loss
# Floats of one chunk of logits. 2^22 (16 MB) stays in a CPU's last-level cache; compiled code there keeps the floats of
# one row only (`_factor`), so it has room for twice as many, and half as many chunks to unroll; on a GPU 2^27 (512 MB)
# fills the device.
CHUNK_ELEMENTS = {"cpu": 2**22, "compiled cpu": 2**23, "cuda": 2**27}


def tokens_per_chunk(num_tokens: int, vocab_size: int, device_type: str) -> int:
    """Rows of a chunk: a power of two of at least 64 whose logits fit the budget of the device."""
    if device_type == "cpu" and torch.compiler.is_compiling():
        device_type = "compiled cpu"
    budget = CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cuda"]) // vocab_size
    return min(num_tokens, max(64, 1 << max(budget, 1).bit_length() - 1))


def _factor(ids: torch.Tensor, softcap: float) -> torch.Tensor | float:
    """2 / cap; in code compiled for a CPU one for each of the rows whose targets are ids (n, 1), all the same. Without
    anything of its own in a row the compiler makes one loop of all rows and writes (n, V) floats to memory between its
    passes; with it, it goes row by row and keeps the V floats of one in the cache, which takes 0.8 of the time."""
    if ids.device.type == "cpu" and torch.compiler.is_compiling():
        return (ids >= 0).float() * (2 / softcap)
    return 2 / softcap


def _shares(outputs: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
    """r = 1 / (1 + exp(2 z / cap)) in float32 for the head's outputs z (n, any).

    The logits are cap * tanh(z / cap) = cap - 2 cap r, with the derivative 4 r (1 - r): an exponential and a division
    cost less than a tanh. Float32 outputs are overwritten."""
    return outputs.float().mul_(factor).exp_().add_(1).reciprocal_()


def _logits(shares: torch.Tensor, softcap: float) -> torch.Tensor:
    return torch.rsub(shares, softcap, alpha=2 * softcap)


def _chunk(
    rows: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, softcap: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shares r and exp(logits) (n, V), the sums of these and the targets' logits (n, 1), of rows (n, C) and ids (n, 1).
    The cap bounds the logits (the configuration allows caps up to 64), so the usual search for the largest one, two
    more passes over the chunk, is not needed."""
    outputs, factor = rows @ weight.T, _factor(ids, softcap)
    target_logits = _logits(_shares(outputs.gather(-1, ids), factor), softcap)
    shares = _shares(outputs, factor)
    exponentials = _logits(shares, softcap).exp_()
    return shares, exponentials, exponentials.sum(-1, keepdim=True), target_logits


def chunked_token_losses(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float
) -> torch.Tensor:
    """-log p(target) for every token, for evaluation (nothing is kept for a backward pass).

    Args:
        hidden: (N, C) states after the last norm.
        weight: (V, C) weight of the head; cast to the dtype of `hidden`.
        targets: (N,) token ids, or IGNORE_INDEX.

    Returns:
        (N,) float32 losses in nats, 0 where the target is ignored.
    """
    weight = weight.detach().to(hidden.dtype)
    chunk = tokens_per_chunk(len(hidden), len(weight), hidden.device.type)
    losses = []
    for rows, ids in zip(hidden.detach().split(chunk), targets.split(chunk)):
        _, _, sums, target_logits = _chunk(rows, weight, ids.clamp(min=0).unsqueeze(-1), softcap)
        losses.append(sums.log() - target_logits)
    return torch.cat(losses).squeeze(-1).masked_fill(targets == IGNORE_INDEX, 0.0)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over the tokens of token_weight * -log p(target), with both gradients made in the forward pass.

    Arguments of `apply`: hidden (N, C), weight (V, C), targets (N,), token_weights (N,) float32 (0 where the target is
    ignored), softcap. Returns a float32 scalar. No gradient flows to the token weights.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weights, softcap):
        cast_weight = weight.to(hidden.dtype)  # (V, C)
        chunk = tokens_per_chunk(len(hidden), len(weight), hidden.device.type)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grads = []
        weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        for rows, ids, scale in zip(hidden.split(chunk), targets.split(chunk), token_weights.split(chunk)):
            ids, scale = ids.clamp(min=0).unsqueeze(-1), scale.unsqueeze(-1)  # (n, 1)
            shares, exponentials, sums, target_logits = _chunk(rows, cast_weight, ids, softcap)
            loss = loss + ((sums.log() - target_logits) * scale).sum()
            # d loss / d head output = (probability - is target) * 4 r (1 - r), times the token's weight
            logits_grad = _subtract_at(exponentials.mul_(4 * scale / sums), ids, 4 * scale)
            logits_grad = logits_grad.mul_(shares.addcmul_(shares, shares, value=-1)).to(hidden.dtype)
            hidden_grads.append(logits_grad @ cast_weight)  # (n, C)
            if hidden.dtype == torch.float32:
                weight_grad.addmm_(logits_grad.T, rows)  # (V, C)
            else:
                weight_grad.add_(logits_grad.T @ rows)
        ctx.save_for_backward(torch.cat(hidden_grads), weight_grad.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, loss_grad):
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * loss_grad.to(hidden_grad.dtype), weight_grad * loss_grad, None, None, None


def _subtract_at(matrix: torch.Tensor, ids: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """Subtracts amounts (n, 1) from the columns ids (n, 1) of a matrix (n, V), in place where that can be. A compiler
    fuses a comparison into the passes around it, of int32, as 64 bits fill twice the registers; without one, touching
    n elements beats passes over all."""
    if torch.compiler.is_compiling():
        columns = torch.arange(matrix.shape[1], dtype=torch.int32, device=ids.device)
        return torch.where(columns == ids.to(torch.int32), matrix - amounts, matrix)
    return matrix.scatter_add_(-1, ids, -amounts)


def _drop_ignored(hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Leave out tokens without loss: fine-tuning has more of them than others, and the head is a third of the work of
    a small network. Not on a GPU, where asking how many there are waits for it, nor compiled, where lengths are fixed.
    """
    counted = (targets != IGNORE_INDEX).nonzero().squeeze(-1)
    if 0 < len(counted) < len(targets):
        return hidden[counted], targets[counted]
    return hidden, targets


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Mean loss over the targets that are not ignored, or the sum over `num_items` if that is given.

    Args:
        hidden: (N, C) states after the last norm.
        weight: (V, C) weight of the head.
        targets: (N,) token ids, or IGNORE_INDEX.
        num_items: number of targets of a whole optimizer step (several micro-batches), as the Trainer counts them.

    Returns:
        float32 scalar in nats; 0 if every target is ignored.
    """
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        hidden, targets = _drop_ignored(hidden, targets)
    counted = targets != IGNORE_INDEX
    if num_items is None:
        num_items = counted.sum().clamp(min=1)
    return chunked_weighted_loss(hidden, weight, targets, counted.float() / num_items, softcap)


def chunked_weighted_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, token_weights: torch.Tensor, softcap: float
) -> torch.Tensor:
    """Sum over the tokens of token_weight * -log p(target), as a float32 scalar.

    Args:
        hidden: (N, C) states after the last norm.
        weight: (V, C) weight of the head.
        targets: (N,) token ids, or IGNORE_INDEX where the token's weight is 0.
        token_weights: (N,) float32; no gradient flows to them.
    """
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return (chunked_token_losses(hidden, weight, targets, softcap) * token_weights).sum()
    return ChunkedCrossEntropy.apply(hidden, weight, targets, token_weights, softcap)
