"""Finds the compute-optimal depth: sweeps FLOP budgets x depths, fits the best size for each budget, and plots both.

    accelerate launch --config_file recipes/accelerate/one_cpu.yaml -m modeling_nanochat.recipes.scaling_laws \\
        --config recipes/configs/scaling_laws.yaml

Every cell of the sweep is an ordinary pretraining run in a folder of its own, so an interrupted sweep goes on where it
stopped. For each budget a parabola through (log parameters, bits per byte) gives the best size (IsoFLOP curves, the
second method of Hoffmann et al., arXiv 2203.15556); a power law through those says how size and tokens should grow with
compute. The price is that the sizes must enclose the minimum: a budget whose best size lies at the edge is left out.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.pretrain import FOLLOWS, RunSettings, pretrain
from modeling_nanochat.recipes.stages.record import Stage, read_stage
from modeling_nanochat.training.ranks import on_main_process


@dataclass
class SweepArguments:
    """The grid. Everything else is a setting of the pretraining runs, the same for all of them."""

    flops: list[float] = field(
        default_factory=lambda: [1e18, 2.15e18, 4.64e18, 1e19], metadata={"help": "Budgets of FLOPs."}
    )
    depths: list[int] = field(
        default_factory=lambda: [8, 10, 12, 14, 16, 18, 20], metadata={"help": "Depths to try with each budget."}
    )

    def __post_init__(self):
        self.flops = [float(budget) for budget in self.flops]  # YAML reads 1.0e18, without a sign, as text


@dataclass(frozen=True)
class Cell:
    """What one run of the sweep came to."""

    flops: float
    depth: int
    parameters: int  # scaling parameters
    tokens: int
    bits_per_byte: float


@dataclass(frozen=True)
class Optimum:
    """The bottom of one budget's parabola."""

    flops: float
    parameters: float
    tokens: float
    bits_per_byte: float


def run_cell(settings: RunSettings, flops: float, depth: int) -> Cell:
    """Train one cell, or read what it came to if it is done."""
    folder = Path(settings.config.output_dir) / f"flops_{flops:.2e}" / f"depth_{depth:02d}"
    pretrain(
        dataclasses.replace(
            settings,
            network=dataclasses.replace(settings.network, depth=depth),
            horizon=dataclasses.replace(settings.horizon, target_flops=flops),
            config=dataclasses.replace(settings.config, output_dir=str(folder)),
        )
    )
    results = on_main_process(lambda: read_stage(folder))["results"]  # which the main process wrote
    return Cell(flops, depth, results["scaling_parameters"], results["tokens"], results["validation_bits_per_byte"])


def best_of_budget(cells: Sequence[Cell]) -> Optimum | None:
    """The bottom of the parabola through one budget's cells, or None if they do not enclose one."""
    sizes = np.log([cell.parameters for cell in cells])
    if len(cells) < 3:
        return None
    curvature, slope, offset = np.polyfit(sizes, [cell.bits_per_byte for cell in cells], 2)
    if curvature <= 0 or not sizes.min() < (bottom := -slope / (2 * curvature)) < sizes.max():
        return None
    tokens = np.exp(np.interp(bottom, np.sort(sizes), np.log([c.tokens for c in sorted(cells, key=_size)])))
    return Optimum(cells[0].flops, float(np.exp(bottom)), float(tokens), float(offset + slope * bottom / 2))


def _size(cell: Cell) -> int:
    return cell.parameters


def power_law(optima: Sequence[Optimum], quantity: str) -> tuple[float, float]:
    """(exponent, factor) of `quantity` = factor * flops ** exponent through two or more optima."""
    flops, values = ([getattr(each, name) for each in optima] for name in ("flops", quantity))
    exponent, logarithm = np.polyfit(np.log(flops), np.log(values), 1)
    return float(exponent), float(np.exp(logarithm))


def plot(cells: Sequence[Cell], optima: Sequence[Optimum], file: Path) -> None:
    """IsoFLOP curves on the left; best parameters and tokens against compute on the right."""
    from matplotlib.figure import Figure  # without pyplot: no display is needed

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, laws = figure.subplots(1, 2)
    for flops in sorted({cell.flops for cell in cells}):
        chosen = sorted((cell for cell in cells if cell.flops == flops), key=_size)
        sizes, values = [cell.parameters for cell in chosen], [cell.bits_per_byte for cell in chosen]
        (line,) = curves.plot(sizes, values, "o", label=f"{flops:.2g} FLOPs")
        if len(chosen) >= 3:
            grid = np.linspace(np.log(sizes[0]), np.log(sizes[-1]), 100)
            curves.plot(np.exp(grid), np.polyval(np.polyfit(np.log(sizes), values, 2), grid), color=line.get_color())
    curves.plot([o.parameters for o in optima], [o.bits_per_byte for o in optima], "k*", markersize=11, label="best")
    curves.set(xscale="log", xlabel="scaling parameters", ylabel="validation bits per byte")
    curves.legend()
    for quantity in ("parameters", "tokens"):
        (line,) = laws.plot([o.flops for o in optima], [getattr(o, quantity) for o in optima], "o")
        label = quantity
        if len(optima) >= 2:
            exponent, factor = power_law(optima, quantity)
            flops = np.geomspace(min(o.flops for o in optima), max(o.flops for o in optima), 20)
            laws.plot(flops, factor * flops**exponent, color=line.get_color())
            label = f"{quantity} ~ FLOPs^{exponent:.2f}"
        line.set_label(label)
    if optima:  # logarithmic axes cannot be drawn empty
        laws.set(xscale="log", yscale="log")
    laws.set(xlabel="FLOPs", ylabel="best")
    laws.legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    sweep, *groups = parse(SweepArguments, *RunSettings.CLASSES, refused=FOLLOWS | {"depth": "depths"})
    settings = RunSettings(*groups)
    arguments, config = settings.arguments, settings.config
    inputs = [arguments.data, arguments.tokenizer]
    stage = Stage("scaling_laws", config.output_dir, [sweep, *groups], inputs, arguments.rerun)
    if stage.is_done():
        return
    stage.announce(runs=len(sweep.flops) * len(sweep.depths), flops=len(sweep.depths) * sum(sweep.flops))
    cells = [run_cell(settings, flops, depth) for flops in sweep.flops for depth in sweep.depths]
    optima = [best_of_budget([cell for cell in cells if cell.flops == flops]) for flops in sweep.flops]
    optima = [optimum for optimum in optima if optimum is not None]
    results: dict[str, object] = {
        "cells": [dataclasses.asdict(cell) for cell in cells],
        "optima": [dataclasses.asdict(optimum) for optimum in optima],
    }
    if len(optima) >= 2:
        results["parameters_exponent"] = power_law(optima, "parameters")[0]
        results["tokens_exponent"] = power_law(optima, "tokens")[0]
    if optima:
        results["tokens_per_parameter"] = float(np.median([o.tokens / o.parameters for o in optima]))
    if config.process_index == 0:
        plot(cells, optima, Path(config.output_dir) / "scaling_laws.png")
    stage.finish(results)


if __name__ == "__main__":
    run(main)
