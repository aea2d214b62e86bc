"""Pictures of a stage's curves, from its log: one panel for each thing that was measured.

What is drawn is a table (`PANELS`). Noisy series are drawn pale with their running mean on top of them; series of
intervals get a band. Drawn by matplotlib without a screen.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from modeling_nanochat.training.whole_files import write_whole_file

Log = Sequence[dict[str, Any]]
COLORS = ("#1f5fa8", "#d1603d", "#2f8f6b")  # blue, red, green: told apart in print and by the colour-blind
RUN_COLORS = (*COLORS, "#8b5fbf", "#b8860b", "#555555")
GREY = "#666666"
SMOOTHED_FROM = 40  # points of a series, from which on a running mean helps the eye
WINDOW_SHARE = 1 / 20  # of a series that the running mean is taken over
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "figure.dpi": 130,
}


@dataclass(frozen=True)
class Panel:
    """One set of axes: a title, the unit of its vertical axis, and keys of the log with what they are called."""

    title: str
    unit: str
    series: dict[str, str]
    share: bool = False  # values from 0 to 1
    noisy: bool = True  # a running mean helps


PANELS = {
    "pretrain": (
        Panel("Training loss", "nats per token", {"loss": "training"}),
        Panel("Validation", "bits per byte", {"validation_bits_per_byte": "validation"}),
        Panel("Speed", "tokens per second", {"tokens_per_second": "tokens per second"}, noisy=False),
    ),
    "sft": (
        Panel("Loss on the assistant's tokens", "nats per token", {"loss": "training", "eval_loss": "validation"}),
        Panel("Learning rate", "of the head", {"learning_rate": "learning rate"}, noisy=False),
    ),
    "rl": (
        Panel("Reward while training", "share of right answers", {"reward": "reward"}, share=True),
        Panel(
            "Held-out problems", "chance to be right", {"eval_pass@1": "pass@1", "eval_pass@8": "pass@8"}, share=True
        ),
        Panel("Length of answers", "tokens", {"completions/mean_length": "mean"}),
        Panel("Entropy", "nats per sampled token", {"entropy": "entropy"}),  # near 0, nothing is left to find out
    ),
}


def draw_curves(record: dict[str, Any], file: Path) -> Path | None:
    """Draw the curves of a stage's record into a PNG; None if its log holds nothing that is drawn."""
    log = [*record["log_history"], before_training(record["results"])]
    panels = [
        panel for panel in PANELS.get(record["name"], ()) if any(len(points(log, key)[0]) for key in panel.series)
    ]
    if not panels:
        return None
    last = max(points(log, key)[0][-1] for panel in panels for key in panel.series if points(log, key)[0])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(4.4 * len(panels), 3.2), squeeze=False, layout="constrained"
        )
        for panel, ax in zip(panels, axes[0]):
            draw_panel(ax, panel, log)
            ax.set_xlim(-0.02 * last, 1.02 * last)
        write_whole_file(file, lambda path: figure.savefig(path, format="png"))
        plt.close(figure)
    return file


def draw_curves_together(records: Mapping[str, dict[str, Any]], file: Path) -> Path | None:
    """The curves of one stage in several runs over each other: a color for each run, a dash for each series."""
    logs = {run: [*record["log_history"], before_training(record["results"])] for run, record in records.items()}
    panels = [
        panel
        for panel in PANELS.get(next(iter(records.values()))["name"], ())
        if any(points(log, key)[0] for log in logs.values() for key in panel.series)
    ]
    if not panels:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(4.4 * len(panels), 3.4), squeeze=False, layout="constrained"
        )
        for panel, ax in zip(panels, axes[0]):
            for (run, log), color in zip(logs.items(), itertools.cycle(RUN_COLORS)):
                for (key, name), dash in zip(panel.series.items(), ("-", "--", ":")):
                    steps, values = points(log, key)
                    smooth = panel.noisy and len(values) >= SMOOTHED_FROM
                    shown = f"{run}, {name}" if len(panel.series) > 1 else run
                    ax.plot(steps, running_mean(values) if smooth else values, dash, color=color, label=shown)
            ax.set(title=panel.title, xlabel="step", ylabel=panel.unit, ylim=(0, 1) if panel.share else None)
        axes[0][0].legend()
        write_whole_file(file, lambda path: figure.savefig(path, format="png"))
        plt.close(figure)
    return file


def draw_panel(ax: plt.Axes, panel: Panel, log: Log) -> None:
    """One panel: every series as a line, its noise pale, its interval a band, its last value written at its end."""
    several = len(panel.series) > 1
    ends = [values[-1] for key in panel.series if (values := points(log, key)[1])]
    for (key, name), color in zip(panel.series.items(), COLORS):
        steps, values = points(log, key)
        if not steps:
            continue
        smooth = panel.noisy and len(values) >= SMOOTHED_FROM
        few = len(values) < SMOOTHED_FROM
        if smooth:
            ax.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        bounded = points(log, key, "low")[0]
        if bounded:
            low, high = points(log, key, "low")[1], points(log, key, "high")[1]
            ax.fill_between(bounded, low, high, color=color, alpha=0.12, linewidth=0)
        line = running_mean(values) if smooth else values
        style = ":" if len(values) == 2 else "-"  # nobody knows what lies between before and after
        ax.plot(steps, line, style, color=color, linewidth=1.8, label=name, marker="o" if few else None, markersize=3.5)
        last = line[-1]
        text = f"{last:,.3g}" if last < 1000 else f"{last:,.0f}"
        place = "center" if not several else "bottom" if values[-1] == max(ends) else "top"  # so that none overlap
        ax.annotate(
            text, (steps[-1], last), xytext=(4, 0), textcoords="offset points", color=color, va=place, fontsize=9,
            annotation_clip=False,
        )  # fmt: skip
    ax.set(title=panel.title, xlabel="step", ylabel=panel.unit)
    if panel.share:
        ax.set_ylim(0, 1)
    if several:
        ax.legend()


def before_training(results: dict[str, Any]) -> dict[str, Any]:
    """What was measured before the first step, from the results: `x_before` is the first point of `eval_x`."""
    found = {name.removesuffix("_before").removeprefix("validation_"): value
             for name, value in results.items() if name.endswith("_before")}  # fmt: skip
    return {"step": 0, **{f"eval_{name}": value for name, value in found.items()}}


def points(log: Log, key: str, part: str = "mean") -> tuple[list[float], list[float]]:
    """Steps and values of a series, in the order of the steps; of a step that was logged twice the last value.

    Of intervals the mean, or another `part`; a plain number has a mean only.
    """
    found = {line["step"]: line[key] for line in log if key in line and "step" in line}
    found = {step: value if isinstance(value, dict) else {"mean": value} for step, value in found.items()}
    steps = sorted(step for step, value in found.items() if part in value)
    return steps, [found[step][part] for step in steps]


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean of each value and its neighbours on both sides, so that the line does not lag behind."""
    reach = max(1, round(len(values) * WINDOW_SHARE / 2))
    means = []
    for place in range(len(values)):
        near = values[max(0, place - reach) : place + reach + 1]
        means.append(sum(near) / len(near))
    return means
