"""What a model that only runs needs everywhere: rows of unequal length as one batch, eval mode for a while, and how a
checkpoint answers unless told otherwise."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

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
