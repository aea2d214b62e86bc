"""Bits per byte: how well a model predicts text, in a unit that does not depend on its tokenizer.

The losses of all scored targets are summed and divided by the bytes those targets stand for. Special tokens stand for
no text, so they count neither above nor below; ignored targets likewise. A loss per token would reward small
vocabularies, and dividing by an average length would weigh rare long tokens wrongly.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers import PreTrainedModel

from modeling_nanochat.chunked_cross_entropy import IGNORE_INDEX
from modeling_nanochat.inference import eval_mode


@torch.no_grad()
def evaluate_bits_per_byte(
    model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]], token_bytes: Sequence[int] | torch.Tensor
) -> float:
    """Bits per byte over all batches, and over all ranks if there are several (each brings its own batches).

    Args:
        model: a causal language model.
        batches: `{"input_ids", "shift_labels"}`, both (B, T); `shift_labels` are the targets, -100 where none is
            scored; `attention_mask` (B, T) may stand beside them.
        token_bytes: (V,) bytes that each token id stands for, 0 for special tokens.

    Returns:
        Bits per byte; infinity if no target stands for a byte.
    """
    lengths = torch.as_tensor(token_bytes, device=model.device)  # (V,)
    sums = torch.zeros(2, dtype=torch.float64, device=model.device)  # nats, bytes
    with eval_mode(model):
        for batch in batches:
            targets = batch["shift_labels"].to(model.device)  # (B, T)
            mask = batch.get("attention_mask")
            losses = token_losses(
                model, batch["input_ids"].to(model.device), targets, None if mask is None else mask.to(model.device)
            )
            target_bytes = lengths[targets.clamp(min=0)] * (targets != IGNORE_INDEX)  # (B, T)
            sums[0] += (losses.double() * (target_bytes > 0)).sum()
            sums[1] += target_bytes.sum()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    nats, size = sums.tolist()
    return nats / (math.log(2) * size) if size else math.inf


def token_losses(
    model: PreTrainedModel, input_ids: torch.Tensor, targets: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """-log p(target) at every position, (B, T) float32, 0 where the target is -100.

    Our own networks make it in chunks (`token_losses`); of any other the logits of the whole batch are made.
    """
    if hasattr(model, "token_losses"):
        return model.token_losses(input_ids, targets, attention_mask)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits  # (B, T, V)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return losses.view(targets.shape)
