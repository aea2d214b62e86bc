"""pass@k: the chance that at least one of k sampled answers is right, with an interval that says how sure that is.

Of n samples of a question c are right; `1 - C(n-c, k) / C(n, k)` is the unbiased estimate (Chen et al. 2021, arXiv
2107.03374), unlike drawing k once. The mean over questions is a mean of values in [0, 1], for which the interval here
is Wilson's score interval with an effective number of questions: n * p(1-p) / variance, at most the number of
independent samples. For one sample a question it is exactly Wilson's; with several it narrows by as much as the values
vary less than single throws; and, unlike a bootstrap or a normal interval, it keeps a sensible width when every
question or none was solved.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054  # of a normal distribution: 95% lie within so many deviations


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its 95% confidence interval; as a number it is its mean."""

    mean: float
    low: float
    high: float

    def __float__(self) -> float:
        return self.mean


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers among n examples, with what makes it comparable.

    Attributes:
        stderr: standard error, as of a share of independent examples.
        baseline: what guessing gives.
        centered: the accuracy on a scale where guessing is 0 and perfection is 1.
    """

    accuracy: float
    n: int
    stderr: float
    baseline: float
    centered: float

    @classmethod
    def of(cls, values: Sequence[float], baseline: float = 0.0) -> "Accuracy":
        """Of one value in [0, 1] for each example; bools will do."""
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        return cls(mean, len(values), math.sqrt(variance / len(values)), baseline, (mean - baseline) / (1 - baseline))


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


def summarize_passes(num_correct: Sequence[int], num_samples: int, ks: Sequence[int] = (1, 8)) -> dict[str, Interval]:
    """`pass@k` with its interval for every k up to the number of samples.

    Args:
        num_correct: for each question, how many of its samples were right.
        num_samples: samples of each question.
        ks: the k's wanted; those above `num_samples` are left out.
    """
    figures = {}
    for k in ks:
        if k <= num_samples:
            values = [pass_at_k(num_samples, correct, k) for correct in num_correct]
            figures[f"pass@{k}"] = mean_with_interval(values, max(1, num_samples // k))
    return figures
