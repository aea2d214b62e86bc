"""pass@k: the chance that at least one of k sampled answers is right, with an interval that says how sure that is.

Of n samples of a question c are right; `1 - C(n-c, k) / C(n, k)` is the unbiased estimate (Chen et al. 2021, arXiv
2107.03374), unlike drawing k once. The mean over questions is a mean of values in [0, 1], for which the interval here
is Wilson's score interval with an effective number of questions: n * p(1-p) / variance, at most the number of
independent samples. For one sample a question it is exactly Wilson's; with several it narrows by as much as the values
vary less than single throws; and, unlike a bootstrap or a normal interval, it keeps a sensible width when every
question or none was solved.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_nanochat.eval.sampling import generate_batch
from modeling_nanochat.tokenization_nanochat_gpt import render_prompt

Z_95 = 1.959963984540054  # of a normal distribution: 95% lie within so many deviations


class Interval(NamedTuple):
    """A mean and the bounds of its 95% confidence interval."""

    mean: float
    low: float
    high: float


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from `num_samples` of which some were.

    Raises:
        ValueError: unless 0 <= num_correct <= num_samples and 1 <= k <= num_samples.
    """
    if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
        raise ValueError(
            f"expected 0 <= correct <= samples and 1 <= k <= samples, got {num_correct=} {num_samples=} {k=}"
        )
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean_with_interval(values: Sequence[float], draws_per_value: int = 1) -> Interval:
    """Mean of values in [0, 1], one for each question, with its 95% confidence interval.

    Args:
        values: one for each question; bools will do.
        draws_per_value: how many independent samples each value rests on.

    Raises:
        ValueError: without values.
    """
    count = len(values)
    if count == 0:
        raise ValueError("there are no values to average; expected one for each question")
    mean = sum(values) / count
    variance = sum((value - mean) ** 2 for value in values) / count
    effective = count
    if 0 < mean < 1:
        shrinkage = mean * (1 - mean) / variance if variance > 0 else math.inf
        effective = count * max(1.0, min(shrinkage, draws_per_value))
    spread = Z_95**2 / effective
    center = (mean + spread / 2) / (1 + spread)
    half_width = Z_95 * math.sqrt(mean * (1 - mean) / effective + spread / (4 * effective)) / (1 + spread)
    return Interval(mean, max(0.0, center - half_width), min(1.0, center + half_width))


def summarize_passes(num_correct: Sequence[int], num_samples: int, ks: Sequence[int] = (1, 8)) -> dict[str, float]:
    """Figures `pass@k`, `pass@k_low`, `pass@k_high` for every k up to the number of samples.

    Args:
        num_correct: for each question, how many of its samples were right.
        num_samples: samples of each question.
        ks: the k's wanted; those above `num_samples` are left out.
    """
    figures = {}
    for k in ks:
        if k <= num_samples:
            values = [pass_at_k(num_samples, correct, k) for correct in num_correct]
            interval = mean_with_interval(values, max(1, num_samples // k))
            figures |= {f"pass@{k}": interval.mean, f"pass@{k}_low": interval.low, f"pass@{k}_high": interval.high}
    return figures


def sample_and_judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    is_correct: Callable[[str, dict[str, Any]], bool],
    *,
    num_samples: int = 8,
    **sampling: Any,
) -> list[dict[str, Any]]:
    """Sample answers to every row's question and judge them.

    Args:
        rows: `{"messages", ...}`; what is asked is everything before the last assistant message.
        is_correct: called with (text of a completion, its row).
        num_samples: completions of each question.
        sampling: for `generate_batch`: max_new_tokens, temperature, top_k, seed, batch_rows.

    Returns:
        For each row `{"question": str, "completions": list of str, "correct": list of bool}`; the texts show the
        calculator's marks.
    """
    questions = [question_of(row["messages"]) for row in rows]
    prompts = [render_prompt(tokenizer, question) for question in questions]
    samples = generate_batch(model, tokenizer, prompts, num_samples=num_samples, **sampling)
    records = []
    for question, row, completions in zip(questions, rows, samples):
        texts = [tokenizer.decode(ids) for ids in completions]
        correct = [bool(is_correct(text, row)) for text in texts]
        records.append({"question": question[-1]["content"], "completions": texts, "correct": correct})
    return records


def question_of(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages before the last answer: what a model is asked."""
    return list(messages[:-1] if messages[-1]["role"] == "assistant" else messages)
