"""Chat evaluations: questions with letters, questions with checkable answers, and ChatCORE over both.

A categorical question is answered by the likeliest of its letters right after `<|assistant_start|>`: one forward pass,
nothing sampled, and a model that talks instead of answering is still measured on what it knows. A generative question
is answered by sampling, and a checker says whether the answer is right. ChatCORE is the mean of the centred accuracies,
0 for guessing and 1 for perfect; it compares models only over the same tasks, so say which went in.
"""

from collections.abc import Mapping, Sequence
from string import ascii_uppercase as LETTERS
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_nanochat.eval.intervals import Interval, mean_with_interval
from modeling_nanochat.eval.tasks import multiple_choice
from modeling_nanochat.inference import eval_mode, pad_left
from modeling_nanochat.tokenization_nanochat_gpt import encode_text, generation_token_ids, render_prompt


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
    prompts = [render_prompt(tokenizer, multiple_choice.to_messages(row)[:1]) for row in rows]
    letters = letter_tokens(tokenizer, max((len(row["choices"]) for row in rows), default=0))
    pad_token_id = generation_token_ids(tokenizer)["pad_token_id"]
    predictions = [0] * len(rows)
    with eval_mode(model):
        for chosen in batches_by_length(prompts, batch_tokens):
            ids, mask = pad_left([prompts[index] for index in chosen], pad_token_id, model.device)
            output = model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[:, -1]  # (B, V)
            for index, scores in zip(chosen, output[:, letters].tolist()):
                choices = range(len(rows[index]["choices"]))
                predictions[index] = max(choices, key=scores.__getitem__)
    return predictions


def letter_tokens(tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """Ids of the first `count` letters, each a single token."""
    tokens = [encode_text(tokenizer, letter) for letter in LETTERS[:count]]
    if any(len(ids) != 1 for ids in tokens):
        raise ValueError(f"each letter must be one token, but {LETTERS[:count]} are {tokens}")
    return [ids[0] for ids in tokens]


def batches_by_length(rows: Sequence[Sequence[int]], batch_tokens: int) -> list[list[int]]:
    """Indices of the rows in batches of similar length, the longest first (memory runs out at once or never)."""
    batches: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda index: -len(rows[index])):
        if batches and (len(batches[-1]) + 1) * len(rows[batches[-1][0]]) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def evaluate_categorical(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], **options: int
) -> Interval:
    """Accuracy over lettered questions, with its confidence interval. Options: `batch_tokens`."""
    predictions = predict_letters(model, tokenizer, rows, **options)
    return mean_with_interval([prediction == row["answer"] for prediction, row in zip(predictions, rows)])


def guessing_accuracy(rows: Sequence[dict[str, Any]]) -> float:
    """What guessing among each question's choices is right in, on average."""
    return sum(1 / len(row["choices"]) for row in rows) / len(rows)


def centered(accuracy: float, baseline: float) -> float:
    """Accuracy on a scale where guessing is 0 and perfection is 1."""
    return (accuracy - baseline) / (1 - baseline)


def chat_core(accuracies: Mapping[str, float], baselines: Mapping[str, float]) -> float:
    """Mean of the centred accuracies; `baselines` has an entry for every task that is not 0 for guessing."""
    scores = [centered(accuracy, baselines.get(task, 0.0)) for task, accuracy in accuracies.items()]
    return sum(scores) / len(scores)
