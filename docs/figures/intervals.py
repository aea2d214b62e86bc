"""How far to trust a share of right answers: intervals of many evaluations of one model, and pass@k."""

import random

import matplotlib.pyplot as plt
from drawing import BLUE, GREY, RED, save

from modeling_nanochat.eval.intervals import mean_with_interval, pass_at_k

TRUTH = 0.6


def main() -> None:
    rng = random.Random(0)
    figure, (dots, curves) = plt.subplots(1, 2, figsize=(10, 3.5), width_ratios=(1.3, 1))
    place = 0
    for questions in (25, 100, 400):
        missed = 0
        for trial in range(1000):
            interval = mean_with_interval([rng.random() < TRUTH for _ in range(questions)])
            misses = not interval.low <= TRUTH <= interval.high
            missed += misses
            if trial < 30:
                dots.plot(
                    [place + trial] * 2, [interval.low, interval.high], color=RED if misses else BLUE, linewidth=1.6
                )
                dots.plot(place + trial, interval.mean, "o", color=RED if misses else BLUE, markersize=3)
        half = mean_with_interval([1.0] * int(TRUTH * questions) + [0.0] * (questions - int(TRUTH * questions)))
        print(
            f"{questions} questions: interval {half.low:.3f}-{half.high:.3f}, misses the truth {missed} times of 1,000"
        )
        dots.text(place + 15, 1.02, f"{questions} questions", ha="center", size=9, color=GREY)
        place += 36
    dots.axhline(TRUTH, color="black", linewidth=0.8)
    dots.set(xticks=[], ylim=(0.25, 1.1), ylabel="share right, with its 95% interval")
    dots.set_title("One model, right in 60%, examined 90 times")
    ks = range(1, 17)
    for correct, color in ((1, GREY), (2, RED), (4, BLUE), (8, "black")):
        curves.plot(ks, [pass_at_k(16, correct, k) for k in ks], "o-", markersize=3, color=color,
                    label=f"{correct} of 16 samples right")  # fmt: skip
    print("pass@1, pass@8 of 2 in 16:", pass_at_k(16, 2, 1), pass_at_k(16, 2, 8))
    curves.set(xlabel="k, tries allowed", ylabel="chance that one of them is right", ylim=(0, 1.02))
    curves.set_title("pass@k of four questions")
    curves.legend(fontsize=8)
    save(figure, "intervals")


if __name__ == "__main__":
    main()
