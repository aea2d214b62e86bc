"""Chat evaluations: questions with letters, questions with checkable answers, and ChatCORE over both.

A categorical question is answered by the likeliest of its letters where the assistant begins to speak: one forward
pass, nothing sampled, and a model that talks instead of answering is still measured on what it knows. A generative
question is answered by sampling, and a checker says whether the answer is right. ChatCORE is the mean of the centered
accuracies, 0 for guessing and 1 for perfect; it compares models only over the same tasks, so say which went in.
"""

from collections.abc import Sequence
from string import ascii_uppercase as LETTERS
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_nanochat.eval.batches import batches_by_length
from modeling_nanochat.eval.intervals import Accuracy
from modeling_nanochat.eval.models import chat_prompt, logits_at
from modeling_nanochat.eval.tasks import multiple_choice
from modeling_nanochat.inference import eval_mode
from modeling_nanochat.tokenization_nanochat_gpt import encode_text


@torch.no_grad()
def predict_letters(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    batch_tokens: int = 16384,
) -> list[int]:
    """Index of the choice that the model answers each question with.

    Args:
        rows: `{"question", "choices", "answer"}`.
        batch_tokens: tokens of a batch, padding included; a longer prompt is a batch of its own.

    Raises:
        ValueError: the tokenizer has a letter in several tokens.
    """
    prompts = [chat_prompt(tokenizer, multiple_choice.to_messages(row)[:1]) for row in rows]
    letters = letter_tokens(tokenizer, max((len(row["choices"]) for row in rows), default=0))
    predictions = [0] * len(rows)
    with eval_mode(model):
        for chosen in batches_by_length(prompts, batch_tokens):
            longest = len(prompts[chosen[0]])
            padded = [prompts[index] + [0] * (longest - len(prompts[index])) for index in chosen]
            ids = torch.tensor(padded, device=model.device)  # (B, T); what comes after a token does not change it
            last = torch.tensor([len(prompts[index]) - 1 for index in chosen], device=model.device)
            scores = logits_at(model, ids, torch.arange(len(ids), device=ids.device), last, use_cache=False)
            for index, found in zip(chosen, scores[:, letters].tolist()):
                choices = range(len(rows[index]["choices"]))
                predictions[index] = max(choices, key=found.__getitem__)
    return predictions


def letter_tokens(tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """Ids of the first `count` letters, each a single token."""
    tokens = [encode_text(tokenizer, letter) for letter in LETTERS[:count]]
    if any(len(ids) != 1 for ids in tokens):
        raise ValueError(f"each letter must be one token, but {LETTERS[:count]} are {tokens}")
    return [ids[0] for ids in tokens]


def guessing_accuracy(rows: Sequence[dict[str, Any]]) -> float:
    """What guessing among each question's choices is right in, on average."""
    return sum(1 / len(row["choices"]) for row in rows) / len(rows)


def chat_core(accuracies: Sequence[Accuracy]) -> float:
    """Mean of the centered accuracies."""
    return sum(accuracy.centered for accuracy in accuracies) / len(accuracies)
