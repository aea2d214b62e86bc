"""Where a model stands on CORE: its number among those of models that everybody knows, as a picture.

GPT-2's numbers are upstream's measurements of OpenAI's weights; upstream's own models are named by their depth.
Sources: nanochat's leaderboard and `dev/` (GPT-2, d24, d26), `dev/LOG.md` (d16 on 2026-01-15, d18 on 2026-02-17), its
first release (d20), the Hub's model cards of d32 and d34. d12, on which most of upstream's experiments run, has numbers
in bits per byte there (0.965 on 2026-01-13) and none on CORE.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from modeling_nanochat.recipes.stages.curves import COLORS, GREY, STYLE
from modeling_nanochat.recipes.stages.tables import is_interval
from modeling_nanochat.training.whole_files import write_whole_file

ANCHORS = {
    "GPT-2 124M": 0.1139,
    "nanochat d16 (2026-01)": 0.155,
    "GPT-2 355M": 0.1849,
    "nanochat d18 (2026-02)": 0.199,
    "GPT-2 774M": 0.2146,
    "nanochat d20 (2025-10)": 0.2219,
    "GPT-2 1.5B": 0.2565,
    "nanochat d26 (2026-02)": 0.2578,
    "nanochat d24 (2026-01)": 0.2585,
    "nanochat d32 (2025-10)": 0.3168,
    "nanochat d34 (2025-12)": 0.3382,
}
NOISE = (0.2512, 0.2677)  # seven runs of d24 that differ in their seeds alone


def core_of_models(results: Mapping[str, Any]) -> dict[str, Any]:
    """CORE of every model that has it, whole: parts of the benchmark have other names."""
    models = {name: figures for name, figures in results.items() if isinstance(figures, dict)}
    return {name: figures["core"] for name, figures in models.items() if "core" in figures}


def draw_anchors(own: Mapping[str, Any], file: Path) -> Path:
    """A PNG with a dot for every anchor and, highlighted, for the models given (numbers or intervals by name)."""
    values = {name: (value, None) for name, value in ANCHORS.items()}
    for name, value in own.items():
        mean = value["mean"] if isinstance(value, dict) else float(value)
        bounds = value if isinstance(value, dict) else vars(value) if is_interval(value) else None
        values[name] = (mean, bounds)
    order = sorted(values, key=lambda name: values[name][0])
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(6.4, 0.6 + 0.3 * len(order)), layout="constrained")
        ax.axvspan(*NOISE, color=COLORS[0], alpha=0.1, linewidth=0)
        for place, name in enumerate(order):
            mean, bounds = values[name]
            color = COLORS[1] if name in own else GREY
            if bounds:
                ax.plot((bounds["low"], bounds["high"]), (place, place), color=color, linewidth=1.6)
            ax.plot(mean, place, "o", color=color, markersize=5)
            ax.annotate(f"{mean:.3f}", (mean, place), (7, 0), textcoords="offset points", color=color, va="center")
        ax.set_yticks(range(len(order)), order)
        ax.set(title="CORE", xlabel="mean centered accuracy; the band is the noise of one recipe's seeds")
        write_whole_file(file, lambda path: figure.savefig(path, format="png"))
        plt.close(figure)
    return file
