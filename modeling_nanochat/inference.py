"""What a model that only runs needs everywhere: rows of unequal length as one batch, eval mode for a while, weights in
the dtype of the activations, the loss of every token, and how a checkpoint answers unless told otherwise."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .decoder_layer import CastLinear
from .tokenization_nanochat_gpt import generation_token_ids

# Upstream's chat (its chat_cli.py); an answer leaves at least half of a short context to the question.
TEMPERATURE, TOP_K, MAX_NEW_TOKENS = 0.6, 50, 256


def pad_left(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask (0 where padded), both (B, longest row) int64."""
    longest = max(map(len, rows))
    ids = [[pad_token_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """The model is in eval mode inside, and in the mode that it was in afterwards, also after an error."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Matrices and tables in the dtype of the activations for good, for a model that will not be trained: its outputs
    stay the same to the bit, as every one of them is cast when it is used. The scalars keep their float32. No weight
    wants a gradient any more, so what decoding makes of them is kept (`decode_step.py`)."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.to(dtype)


@contextmanager
def weights_cast_once(model: torch.nn.Module) -> Iterator[None]:
    """Inside, a network whose activations have another dtype than its weights holds its matrices in both, instead of
    casting all of them for each token. The weights must not change inside."""
    dtype = next((m.activation_dtype for m in model.modules() if getattr(m, "activation_dtype", None)), None)
    linears = [m for m in model.modules() if isinstance(m, CastLinear) and type(m.weight.data) is torch.Tensor]
    if dtype is None or torch.is_grad_enabled():
        linears = []
    for linear in linears:
        linear.cast_weight = linear.weight.detach().to(dtype)
    try:
        yield
    finally:
        for linear in linears:
            del linear.cast_weight


@torch.no_grad()
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


def chat_generation_config(tokenizer: PreTrainedTokenizerBase, context_length: int) -> GenerationConfig:
    """What is saved with a model: sampling, stop tokens, and that the calculator is to be used."""
    return GenerationConfig(
        **generation_token_ids(tokenizer),
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        max_new_tokens=min(MAX_NEW_TOKENS, context_length // 2),
        use_calculator=True,
    )
