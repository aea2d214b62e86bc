"""Causal and sliding-window attention for CPUs: batched matrix products over blocks of queries.

SDPA's CPU kernel has no window (a mask makes it do all the work and hide some) and its backward pass runs far below
the matrix-product limit. Here a block of queries meets exactly the keys it can see, in one batched product for all
rows and heads, so a window saves what it hides. The probabilities are kept for the backward pass (4 matrix products
instead of the 5 of a recomputation): tokens * heads * visible keys numbers per layer, which at 2048 tokens is about
what the rest of a layer keeps. Beyond that length full layers go back to SDPA's kernel, which keeps nothing.

The two passes are custom operators: a compiled graph holds one node for each instead of an unrolled loop.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCK_ATTENTION = "nanochat_block"  # the name for `attn_implementation`
LONGEST_FULL_ATTENTION = 2048  # tokens; measured: equal to SDPA there, 1.5x faster at 512 (docs/performance.md)


def _block_size(length: int, window: int) -> int:
    """Queries of a block. Small blocks waste less on hidden keys, of which windows have more, large ones keep the
    products efficient (measured: docs/performance.md)."""
    size = 64 if length <= 512 else 128
    return min(2 * size if window >= length else size, length)


def _blocks(length: int, window: int):
    """(first key, first query, end) of each block; a query sees `window` positions, itself included."""
    size = _block_size(length, window)
    reach = -(-(window - 1) // size) * size  # whole blocks before the query's own
    for start in range(0, length, size):
        yield max(0, start - reach), start, min(length, start + size)


def _num_probabilities(length: int, window: int) -> int:
    """Entries kept per row and head, counted in whole blocks (a closed form, as `length` may be symbolic)."""
    size = _block_size(length, window)
    blocks, reach = -(-length // size), -(-(window - 1) // size)
    if blocks <= reach + 1:
        return size * size * (blocks * (blocks + 1) // 2)
    return size * size * ((reach + 1) * (reach + 2) // 2 + (blocks - reach - 1) * (reach + 1))


def _hide(scores: torch.Tensor, window: int) -> None:
    """Adds -inf to the scores of later keys and of keys before the window. (N, G, queries, keys), of which the last
    keys are those of the queries themselves. Adding is faster than filling by a mask."""
    queries, keys = scores.shape[-2:]
    own = keys - queries  # where the queries' own keys begin
    scores[..., own:].add_(scores.new_full((queries, queries), float("-inf")).triu_(1))
    before = keys - window  # keys that the last query no longer sees
    if before > 0:
        scores[..., :before].add_(scores.new_full((queries, before), float("-inf")).tril_(own - window))


def _seen(x: torch.Tensor, first_key: int, end: int) -> torch.Tensor:
    """The keys or values of a block, transposed. (N, T, D) -> (N, D, keys)

    Copied before it is transposed: a product of a transposed slice copies it element by element, which costs as much
    as the product."""
    return x[:, first_key:end].contiguous().transpose(1, 2)


def _grouped(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) -> (B * H_kv, G, T, D), the query heads of a key head side by side."""
    batch, heads, length, head_dim = query.shape
    return query.reshape(batch * key.shape[1], heads // key.shape[1], length, head_dim)


# Compiled code is cached by the operator's name, with the sizes it had: other sizes of what is kept want another name.
@torch.library.custom_op("nanochat::attention_in_blocks", mutates_args=())
def block_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every position to itself and the `window - 1` positions before it.

    Args:
        query: (B, H, T, D), scaled; key and value: (B, H_kv, T, D), H_kv dividing H.
        keep: return the probabilities, which the backward pass needs.

    Returns:
        (B, T, H, D) output and the flat probabilities (empty unless `keep`).
    """
    batch, heads, length, head_dim = query.shape
    grouped = _grouped(query, key)  # (N, G, T, D) with N = B * H_kv
    n, groups = grouped.shape[:2]
    keys, values = key.reshape(n, length, head_dim), value.reshape(n, length, head_dim)
    output = query.new_empty(batch, length, heads, head_dim)
    kept = query.new_empty(n * groups * _num_probabilities(length, window) if keep else 0)
    used = 0
    for first_key, start, end in _blocks(length, window):
        rows = grouped[:, :, start:end].reshape(n, -1, head_dim)  # (N, G * queries, D)
        scores = torch.bmm(rows, _seen(keys, first_key, end))  # (N, G * queries, keys)
        _hide(scores.view(n, groups, end - start, -1), window)
        if keep:
            probabilities = kept[used : used + scores.numel()].view_as(scores)
            used += scores.numel()
            torch.softmax(scores, dim=-1, out=probabilities)
        else:
            probabilities = torch.softmax(scores, dim=-1)
        mixed = torch.bmm(probabilities, values[:, first_key:end])  # (N, G * queries, D)
        output[:, start:end] = mixed.view(batch, heads, -1, head_dim).transpose(1, 2)
    return output, kept


@block_attention.register_fake
def _(query, key, value, window, keep):
    batch, heads, length, head_dim = query.shape
    kept = batch * heads * _num_probabilities(length, window) if keep else 0
    return query.new_empty(batch, length, heads, head_dim), query.new_empty(kept)


@torch.library.custom_op("nanochat::attention_in_blocks_backward", mutates_args=())
def block_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value from the gradient (B, T, H, D) of the output."""
    length, head_dim = query.shape[2:]
    grouped = _grouped(query, key)  # (N, G, T, D)
    n, groups = grouped.shape[:2]
    keys, values = key.reshape(n, length, head_dim), value.reshape(n, length, head_dim)
    grad = _grouped(grad.transpose(1, 2), key)
    query_grad = grouped.new_empty(grouped.shape)  # contiguous, as promised to the compiler; `_like` copies strides
    key_grad, value_grad = keys.new_zeros(keys.shape), values.new_zeros(values.shape)
    used = 0
    for first_key, start, end in _blocks(length, window):
        rows, row_grads = (x[:, :, start:end].flatten(1, 2) for x in (grouped, grad))
        shape = (n, groups * (end - start), end - first_key)
        probabilities = kept[used : used + shape[0] * shape[1] * shape[2]].view(shape)
        used += probabilities.numel()
        value_grad[:, first_key:end].baddbmm_(probabilities.transpose(1, 2), row_grads)
        grads = torch.bmm(row_grads, _seen(values, first_key, end))  # of the probabilities
        score_grads = torch.ops.aten._softmax_backward_data(grads, probabilities, -1, grads.dtype)
        query_grad[:, :, start:end] = torch.bmm(score_grads, keys[:, first_key:end]).view(n, groups, -1, head_dim)
        key_grad[:, first_key:end].baddbmm_(score_grads.transpose(1, 2), rows)
    return query_grad.view(query.shape), key_grad.view(key.shape), value_grad.view(value.shape)


@block_attention_backward.register_fake
def _(grad, query, key, value, kept, window):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _setup_context(ctx, inputs, output):
    query, key, value, ctx.window, _ = inputs
    ctx.save_for_backward(query, key, value, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    grads = block_attention_backward(grad, *ctx.saved_tensors, ctx.window)
    return (*grads, None, None)


block_attention.register_autograd(_backward, setup_context=_setup_context)


def block_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention interface's form. A mask (padding, a cache, packed sequences) means SDPA."""
    length = query.shape[2]
    whole = attention_mask is None and length == key.shape[2] and length > 1
    if not whole or (sliding_window is None and length > LONGEST_FULL_ATTENTION):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    keep = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    # The operators would copy what lies otherwise, in both passes, and scale; here a compiler does so while it writes.
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (query * scaling).contiguous(), key.contiguous(), value.contiguous()
    output, _ = block_attention(query, key, value, min(sliding_window or length, length), keep)
    return output, None


def block_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs,
) -> torch.Tensor | None:
    """No mask where the blocks know what to hide: whole rows without padding; else SDPA's."""
    unpadded = attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all()))
    whole = isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0 and q_length == kv_length
    if allow_is_causal_skip and whole and unpadded and q_length > 1:
        return None
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


AttentionInterface.register(BLOCK_ATTENTION, block_attention_forward)
AttentionMaskInterface.register(BLOCK_ATTENTION, block_attention_mask)
