"""By how much the loss on held-out text rises without each part of the network, for every seed.

Reads docs/figures/missing_parts.json, which `python -m benchmarks.parts_study` writes in three quarters of an hour of
one core: too long for `make figures`.
"""

import json
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from drawing import BLUE, GREY, save

STORED = Path(__file__).with_suffix(".json")


def main() -> None:
    record = json.loads(STORED.read_text(encoding="utf-8"))
    found, control = record["rises"], record["control"]
    order = sorted(found, key=lambda name: statistics.mean(found[name]))
    noise = max(abs(cost) for cost in found[control])
    print("whole network:", [round(loss, 3) for loss in record["whole"]], "noise:", round(noise, 3))
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.42 * len(order)))
    axes.axvspan(-noise, noise, color="#e6e6e6")
    axes.axvline(0, color=GREY, linewidth=0.8)
    for row, name in enumerate(order):
        color = GREY if name == control else BLUE
        axes.plot(found[name], [row] * len(found[name]), "o", color=color, alpha=0.75, markersize=6)
        axes.plot(statistics.mean(found[name]), row, "|", color=color, markersize=16, markeredgewidth=2)
    axes.set_yticks(range(len(order)), order, color="black")
    axes.set(xlabel="rise of the loss, nats per token", ylim=(-0.7, len(order) - 0.3))
    axes.grid(axis="y", visible=False)
    axes.set_title("Without it")
    save(figure, "missing_parts")


if __name__ == "__main__":
    main()
