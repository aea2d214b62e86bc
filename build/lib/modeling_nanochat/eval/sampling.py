"""Sampling from a chat model for evaluation: many prompts, several samples each, with the calculator at hand.

This is Transformers' own `generate`, on batches of prompts of similar length padded on the left. It works for any
chat model; the calculator answers those whose tokenizer has the special tokens to call it. The price of plainness: a
batch takes as long as its longest completion.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from modeling_nanochat.eval.models import chat_prompt, decoding_ids, has_nanochat_tokens
from modeling_nanochat.inference import pad_left
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
        model: a causal language model; it stays in the mode it is in, the caller's random state is kept.
        tokenizer: its tokenizer.
        prompts: token ids, each ending where the model is to go on.
        max_new_tokens: completions are cut off there, the calculator's tokens included.
        temperature: 0 takes the likeliest token; then all samples of a prompt are equal, so only one is allowed.
        top_k: sample among so many tokens only; None for all.
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
    config = generation_config(
        model, tokenizer,
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, num_return_sequences=num_samples,
    )  # fmt: skip
    tools = [CalculatorLogitsProcessor(tokenizer)] if has_nanochat_tokens(tokenizer) else []
    stop = config.eos_token_id or []
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    prompts_at_once = max(1, batch_rows // num_samples)
    completions: list[list[list[int]]] = [[] for _ in prompts]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in range(0, len(order), prompts_at_once):
            chosen = order[start : start + prompts_at_once]
            rows = [prompts[index] for index in chosen]
            input_ids, attention_mask = pad_left(rows, config.pad_token_id, model.device)
            output = model.generate(
                input_ids,
                attention_mask=attention_mask,
                generation_config=config,
                logits_processor=LogitsProcessorList(tools),
            )  # (prompts * num_samples, T)
            for row, ids in enumerate(output[:, input_ids.shape[1] :].tolist()):
                completions[chosen[row // num_samples]].append(until_stop(ids, stop))
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


def generation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    temperature: float,
    top_k: int | None,
    **options: int,
) -> GenerationConfig:
    """Plain sampling that ends with the assistant's turn: nothing a checkpoint's own settings say gets in."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": 1.0}
    ids = decoding_ids(model, tokenizer)
    return GenerationConfig(**ids, **(sampling if temperature > 0 else {"do_sample": False}), **options)


def until_stop(ids: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    """The ids before the first stop token."""
    return next((ids[:position] for position, token in enumerate(ids) if token in stop_token_ids), ids)
