"""pass@k with its interval as a metric of the library `evaluate`, from its folder and without a network.

    evaluate.load("eval/metrics/pass_at_k").compute(predictions=[[1, 0, 1, 0], [0, 0, 0, 1]], k=[1, 4])

`predictions` has, for each question, whether each of its samples was right. Nothing is run here: who judges programs
does so in a sandbox (`eval/sandbox`).
"""

import datasets
import evaluate

from modeling_nanochat.eval.intervals import summarize_passes


class PassAtK(evaluate.Metric):
    """The unbiased estimate of Chen et al. 2021, averaged over questions."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Chen et al. 2021, arXiv 2107.03374",
            inputs_description="predictions: for each question a list of 0 or 1, one for each sample; k: list of k's",
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("bool"))}),
        )

    def _compute(self, predictions: list[list[bool]], k: list[int]) -> dict[str, dict[str, float]]:
        samples = {len(verdicts) for verdicts in predictions}
        if len(samples) != 1:
            raise ValueError(f"the questions have {sorted(samples)} samples; expected the same number for each")
        (number,) = samples
        if not all(1 <= each <= number for each in k):
            raise ValueError(f"k is {k}, expected numbers from 1 to the number of samples, {number}")
        return {
            name: vars(interval) for name, interval in summarize_passes(list(map(sum, predictions)), number, k).items()
        }
