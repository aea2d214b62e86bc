"""Bits per byte: how well a model predicts text, in a unit that does not depend on its tokenizer.

The losses of all scored targets are summed and divided by the bytes those targets stand for. Special tokens stand for
no text, so they count neither above nor below; ignored targets likewise. A loss per token would reward small
vocabularies, and dividing by an average length would weigh rare long tokens wrongly.

`packed_loss` measures rows as they are packed for training; what fills such a row depends on the tokenizer.
`documents_loss` measures whole documents, so models with different tokenizers are asked about the same bytes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_nanochat.chunked_cross_entropy import IGNORE_INDEX
from modeling_nanochat.eval.batches import batches_by_length
from modeling_nanochat.eval.models import context_length, first_tokens
from modeling_nanochat.inference import eval_mode, token_losses
from modeling_nanochat.tokenization_nanochat_gpt import encode_text

LOGITS_AT_ONCE = 1 << 28  # numbers in the logits of a batch, for models that make them all: 1 GiB in float32
LONGEST_WINDOW = 4096  # tokens of a document that are read at once by models that could read more


@dataclass(frozen=True)
class TextLoss:
    """Summed loss in nats of targets that stand for so many bytes of text."""

    nats: float
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Infinity if no target stands for a byte."""
        return self.nats / (math.log(2) * self.bytes) if self.bytes else math.inf

    @staticmethod
    def total(losses: Iterable["TextLoss"]) -> "TextLoss":
        losses = list(losses)
        return TextLoss(sum(loss.nats for loss in losses), sum(loss.bytes for loss in losses))


@torch.no_grad()
def packed_loss(
    model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]], token_bytes: Sequence[int] | torch.Tensor
) -> TextLoss:
    """The loss of rows of targets.

    Args:
        model: a causal language model.
        batches: `{"input_ids", "shift_labels"}`, both (B, T); `shift_labels` are the targets, -100 where none is
            scored; `attention_mask` (B, T) may stand beside them.
        token_bytes: (V,) bytes that each token id stands for, 0 for special tokens.
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
    nats, size = sums.tolist()
    return TextLoss(nats, int(size))


@torch.no_grad()
def documents_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], batch_tokens: int = 16384
) -> list[TextLoss]:
    """The loss of every document, each read by itself from its first byte to its last.

    A document longer than the context is read in windows, each of which begins with the last token of the one before.
    Its first token is predicted from BOS, or from what ends a document if the tokenizer has no BOS; with neither it
    counts neither above nor below, like the bytes of that token.
    """
    window = min(context_length(model) or LONGEST_WINDOW, LONGEST_WINDOW)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    first = first_tokens(tokenizer) or end
    rows, owners, sizes = [], [], []
    for index, document in enumerate(documents):
        ids = [*first, *encode_text(tokenizer, document)]
        unread = 0 if first else len(tokenizer.decode(ids[:1]).encode())
        sizes.append(max(0, len(document.encode()) - unread))
        for start in range(0, len(ids) - 1, window):
            rows.append(ids[start : start + window + 1])
            owners.append(index)
    nats = [0.0] * len(documents)
    if not hasattr(model, "token_losses"):
        batch_tokens = min(batch_tokens, LOGITS_AT_ONCE // model.config.get_text_config(decoder=True).vocab_size)
    with eval_mode(model):
        for chosen in batches_by_length(rows, batch_tokens):
            longest = len(rows[chosen[0]])
            padded = [rows[place] + [IGNORE_INDEX] * (longest - len(rows[place])) for place in chosen]
            targets = torch.tensor(padded, device=model.device)  # (B, T + 1)
            losses = token_losses(model, targets[:, :-1].clamp(min=0), targets[:, 1:])  # (B, T)
            for place, loss in zip(chosen, losses.double().sum(dim=1).tolist()):
                nats[owners[place]] += loss
    return [TextLoss(loss, size) for loss, size in zip(nats, sizes)]
