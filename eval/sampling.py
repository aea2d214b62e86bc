"""Sampling from a chat model for evaluation: many prompts, several samples each, with the calculator at hand.

Batches of prompts of similar length go through `sample_completions`, which reads each prompt once for all its samples.
That works for any chat model with a cache of keys and values; the calculator answers those whose tokenizer has the
special tokens to call it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from modeling_nanochat.completions import sample_completions
from modeling_nanochat.eval.models import chat_prompt, decoding_ids, has_nanochat_tokens
from modeling_nanochat.tool_use import CalculatorLogitsProcessor

Judge = Callable[[Sequence[tuple[dict[str, Any], str]]], Sequence[bool]]


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int | None = None,
    num_samples: int = 1,
    seed: int = 0,
    batch_rows: int = 64,
) -> list[list[list[int]]]:
    """Completions of every prompt, in the order of the prompts.

    Args:
        model: a causal language model; it stays in the mode it is in, and so does the caller's random state.
        tokenizer: its tokenizer.
        prompts: token ids, each ending where the model is to go on.
        max_new_tokens: completions are cut off there, the calculator's tokens included.
        temperature: 0 takes the likeliest token; then all samples of a prompt are equal, so only one is allowed.
        top_k: sample among so many tokens only; None or 0 for all.
        num_samples: completions of each prompt.
        seed: of the sampling; the same for the same prompts and batch_rows.
        batch_rows: rows sampled at once.

    Returns:
        For each prompt `num_samples` lists of token ids, without the token that ended them.

    Raises:
        ValueError: several samples at temperature 0, or an empty prompt.
    """
    if temperature == 0 and num_samples > 1:
        raise ValueError(f"num_samples is {num_samples} at temperature 0, where all samples are equal; expected 1")
    if not all(prompts):
        raise ValueError("a prompt is empty; expected at least one token")
    ids = decoding_ids(model, tokenizer)
    processors = score_processors(tokenizer, temperature, top_k)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    prompts_at_once = max(1, batch_rows // num_samples)
    completions: list[list[list[int]]] = [[] for _ in prompts]
    generator = torch.Generator().manual_seed(seed)
    stop = ids["eos_token_id"] or []
    for start in range(0, len(order), prompts_at_once):
        chosen = [index for index in order[start : start + prompts_at_once] for _ in range(num_samples)]
        uniforms = torch.rand(len(chosen), max_new_tokens, generator=generator) * (temperature > 0)
        sampled, _ = sample_completions(
            model, [prompts[index] for index in chosen], uniforms,
            stop_token_ids=stop, pad_token_id=ids["pad_token_id"], logits_processor=processors,
        )  # fmt: skip
        for index, completion in zip(chosen, sampled):
            completions[index].append(until_stop(completion, stop))
    return completions


def sample_and_judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    judge: Judge,
    *,
    num_samples: int = 8,
    **sampling: Any,
) -> list[dict[str, Any]]:
    """Sample answers to every row's question and judge them.

    Args:
        rows: `{"messages", ...}`; what is asked is everything before the last assistant message.
        judge: given pairs of a row and the text of a completion, says of each whether it is right.
        num_samples: completions of each question.
        sampling: for `generate_batch`: max_new_tokens, temperature, top_k, seed, batch_rows.

    Returns:
        For each row `{"question": str, "completions": list of str, "correct": list of bool}`; the texts show the
        calculator's marks.

    Raises:
        ValueError: nothing can be asked of the model as in a chat.
    """
    questions = [question_of(row["messages"]) for row in rows]
    prompts = [chat_prompt(tokenizer, question) for question in questions]
    samples = generate_batch(model, tokenizer, prompts, num_samples=num_samples, **sampling)
    texts = [[tokenizer.decode(ids) for ids in completions] for completions in samples]
    verdicts = iter(judge([(row, text) for row, completions in zip(rows, texts) for text in completions]))
    return [
        {"question": question[-1]["content"], "completions": own, "correct": [bool(next(verdicts)) for _ in own]}
        for question, own in zip(questions, texts)
    ]


def question_of(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages before the last answer: what a model is asked."""
    return list(messages[:-1] if messages[-1]["role"] == "assistant" else messages)


def score_processors(tokenizer: PreTrainedTokenizerBase, temperature: float, top_k: int | None) -> LogitsProcessorList:
    """What scores go through before a token is drawn: nothing a checkpoint's own settings say gets in."""
    processors: list[LogitsProcessor] = []
    if temperature > 0 and temperature != 1:
        processors.append(TemperatureLogitsWarper(float(temperature)))
    if top_k or temperature == 0:
        processors.append(TopKLogitsWarper(top_k if temperature else 1))
    if has_nanochat_tokens(tokenizer):
        processors.append(CalculatorLogitsProcessor(tokenizer))
    return LogitsProcessorList(processors)


def until_stop(ids: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    """The ids before the first stop token."""
    return next((ids[:position] for position, token in enumerate(ids) if token in stop_token_ids), ids)
