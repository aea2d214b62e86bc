"""Judges a recipe on a ladder: several depths, several seeds each, one curve, and what a change is worth in compute.

    accelerate launch --config_file recipes/accelerate/one_gpu.yaml -m modeling_nanochat.recipes.ladder \\
        --config ladder/seed
    ... --config ladder/head --reference out/ladder/seed    # the same depths with the same FLOPs, another recipe

A single run says whether a change helped that run. A ladder says it at every size, beside the noise of the seeds. The
multiplier of a run is how many times its FLOPs the reference would need for the same bits per byte, read off a power
law through the reference's runs: 1.2 is a fifth more compute for nothing. Beside it stands what a network of that size
costs to use. Every run is an ordinary pretraining in a folder of its own, so the same command goes on where it stopped,
also after its budget of hours is used up. The price of the seeds is their number; what differs between two of them are
the first weights, not the order of the data.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.pretrain import FOLLOWS, RunSettings, planned, pretrain
from modeling_nanochat.recipes.stages.folder import load_for_inference, load_tokenizer
from modeling_nanochat.recipes.stages.numbers import readable_number, readable_time
from modeling_nanochat.recipes.stages.record import Stage, is_main_process, read_stage
from modeling_nanochat.recipes.stages.tables import markdown_table
from modeling_nanochat.training import devices, scaling
from modeling_nanochat.training.optimizer.sorting import attention_heads
from modeling_nanochat.training.ranks import on_main_process
from modeling_nanochat.training.whole_files import write_whole_file

PROMPT_SHARE = 0.5  # of the context, for the time to the first token
ANSWER_TOKENS = 32
REPEATS = 3
REFUSED = {"depth": "depths", "seed": "seeds", "max_minutes": "max_hours, of all runs"}
SMALLEST_FOR_A_FLOOR = 4  # depths from which on a curve may have a floor: three numbers need more than three points


@dataclass
class LadderArguments:
    """The rungs, and what they are compared with. Everything else is a setting of the runs, the same for all."""

    depths: list[int] = field(default_factory=lambda: [8, 12, 16, 20], metadata={"help": "Depths to train."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of each depth."})
    reference: str | None = field(
        default=None,
        metadata={"help": "Folder of a finished ladder: each depth gets its FLOPs, and multipliers are against it."},
    )
    max_hours: float | None = field(
        default=None, metadata={"help": "Begin no run that would end later than this; the same command goes on."}
    )

    def __post_init__(self):
        for name in ("depths", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values) or min(values) < (name == "depths"):
                raise ValueError(f"{name} is {values}, expected different whole numbers, one at least")
        if self.max_hours is not None and not self.max_hours > 0:
            raise ValueError(f"max_hours is {self.max_hours}, expected a number above 0")
        self.depths = sorted(self.depths)


@dataclass(frozen=True)
class Rung:
    """What one run came to."""

    depth: int
    seed: int
    flops: float
    parameters: int
    tokens: int
    bits_per_byte: float
    seconds: float


@dataclass(frozen=True)
class Use:
    """What a network costs to use, one row at a time on this machine."""

    depth: int
    first_token_seconds: float  # of a prompt of half the context
    token_seconds: float
    token_bytes: int  # weights and cache read for one token, in the middle of the context


@dataclass(frozen=True)
class Curve:
    """bits per byte = floor + factor * flops ** -exponent."""

    floor: float
    factor: float
    exponent: float

    @classmethod
    def through(cls, flops: Sequence[float], losses: Sequence[float]) -> "Curve":
        """The closest one, in logarithms. The floor is tried in a thousand steps; it stays 0 below four sizes."""
        sizes = len(set(flops))
        if sizes < 2:
            raise ValueError(f"a curve through {sizes} size(s), expected two at least: more depths")
        lowest = min(losses)
        floors = np.linspace(0, 0.999, 1000) * lowest if sizes >= SMALLEST_FOR_A_FLOOR else [0.0]
        fits = []
        for floor in floors:
            slope, offset = np.polyfit(np.log(flops), np.log(np.array(losses) - floor), 1)
            # In the loss itself, or a floor near the lowest loss would win by stretching the logarithm.
            wrong = np.array(losses) - floor - np.exp(offset + slope * np.log(flops))
            fits.append((float(wrong @ wrong), cls(float(floor), math.exp(offset), -float(slope))))
        return min(fits, key=lambda fit: fit[0])[1]

    def loss(self, flops: float) -> float:
        return self.floor + self.factor * flops**-self.exponent

    def flops(self, loss: float) -> float:
        """The compute that the curve needs for a loss; infinite below its floor."""
        if loss <= self.floor or self.exponent <= 0:
            return math.inf
        return ((loss - self.floor) / self.factor) ** (-1 / self.exponent)


def multipliers(rungs: Sequence[Rung], reference: Sequence[Rung]) -> dict[int, tuple[float, float | None]]:
    """For each depth the geometric mean of its runs' multipliers, and the factor that one standard error is (None of a
    single run). A loss below the curve's floor is worth infinitely much, and is left out with its depth."""
    curve = Curve.through([each.flops for each in reference], [each.bits_per_byte for each in reference])
    found = {}
    for depth in sorted({each.depth for each in rungs}):
        logs = [math.log(curve.flops(r.bits_per_byte) / r.flops) for r in rungs if r.depth == depth]
        if math.isfinite(sum(logs)):
            error = math.exp(statistics.stdev(logs) / math.sqrt(len(logs))) if len(logs) > 1 else None
            found[depth] = math.exp(statistics.fmean(logs)), error
    return found


# ---------------------------------------------------------------- the runs


def folder_of(ladder: str | Path, depth: int, seed: int) -> Path:
    return Path(ladder) / f"depth_{depth:02d}" / f"seed_{seed}"


def rung_settings(settings: RunSettings, depth: int, seed: int, flops: float | None) -> RunSettings:
    """The settings of one run."""
    folder = folder_of(settings.config.output_dir, depth, seed)
    horizon = settings.horizon if flops is None else dataclasses.replace(settings.horizon, target_flops=flops)
    return dataclasses.replace(
        settings,
        network=dataclasses.replace(settings.network, depth=depth),
        horizon=horizon,
        config=dataclasses.replace(settings.config, output_dir=str(folder), seed=seed),
    )


def read_rung(settings: RunSettings) -> Rung:
    """What a finished run came to. The main process wrote the record, so only it may look."""
    record = on_main_process(lambda: read_stage(settings.config.output_dir))
    results = record["results"]
    return Rung(
        settings.network.depth,
        settings.config.seed,
        results["flops"],
        results["parameters"],
        results["tokens"],
        results["validation_bits_per_byte"],
        record["seconds"],
    )


def reference_rungs(folder: str, depths: Sequence[int]) -> list[Rung]:
    """The runs of a finished ladder.

    Raises:
        ValueError: there is none in the folder, or a depth is missing.
    """
    record = read_stage(folder)
    if record is None or record["name"] != "ladder":
        raise ValueError(f"reference is {folder!r}, expected the folder of a finished ladder")
    rungs = [Rung(**each) for each in record["results"]["rungs"]]
    if missing := sorted(set(depths) - {each.depth for each in rungs}):
        raise ValueError(f"depths has {missing}, which the ladder in {folder} lacks; expected some of its own")
    return rungs


def climb(stage: Stage, runs: Sequence[tuple[RunSettings, float]], max_hours: float | None) -> list[Rung]:
    """Train the runs, the cheapest first, until all are done or the next would not fit into the budget."""
    rungs: list[Rung] = []
    pace = 0.0  # seconds a FLOP of the slowest run of this call; a larger network has a better one
    for settings, flops in runs:
        left = math.inf if max_hours is None else 3600 * max_hours - (time.time() - stage.started)
        if on_main_process(lambda: pace * flops > left or left <= 0):  # noqa: B023 (called at once)
            stage.say(
                f"{len(rungs)} of {len(runs)} runs are done and the next would take about "
                f"{readable_time(pace * flops)}: the budget of {max_hours:g} h is used up; the same command goes on"
            )
            break
        begun = time.time()
        pretrain(settings)
        rungs.append(read_rung(settings))
        pace = max(pace, (time.time() - begun) / flops)
    return rungs


# ---------------------------------------------------------------- what it costs to use


@torch.inference_mode()
def cost_of_use(folder: Path, depth: int) -> Use:
    """Times of the model in a folder: medians of a few tries after one that warms up."""
    model, _ = load_for_inference(str(folder))
    context = model.config.max_position_embeddings
    answer_tokens = max(1, min(ANSWER_TOKENS, context // 4))
    prompt = torch.ones(1, max(1, int(PROMPT_SHARE * context)), dtype=torch.long, device=model.device)  # (1, T)

    def seconds(tokens: int) -> float:
        model.generation_config = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0)
        begin = time.perf_counter()
        model.generate(prompt)
        devices.synchronize(model.device)
        return time.perf_counter() - begin

    seconds(2)
    first = statistics.median(seconds(1) for _ in range(REPEATS))
    answer = statistics.median(seconds(1 + answer_tokens) for _ in range(REPEATS))
    bytes_each = model.get_output_embeddings().weight.element_size()
    read = bytes_of_a_token(model.config, context // 2, bytes_each)
    return Use(depth, first, (answer - first) / answer_tokens, read)


def bytes_of_a_token(config: PreTrainedConfig, position: int, bytes_each: int) -> int:
    """What is read to make the token at a position: every weight that multiplies, a row of each table that is looked
    up, and the keys and values that the layers see."""
    counts = scaling.count_parameters(config)
    rows = (counts.token_embedding + counts.value_embeddings) // config.vocab_size
    seen = sum(position if window is None else min(window, position) for window in scaling.attention_windows(config))
    _, key_value_heads, head_dim = attention_heads(config)
    cache = 2 * key_value_heads * head_dim * seen
    return bytes_each * (scaling.multiplying_parameters(config) + counts.scalars + rows + cache)


# ---------------------------------------------------------------- what is shown


def table(rungs: Sequence[Rung], uses: Sequence[Use], worth: dict[int, tuple[float, float | None]]) -> str:
    """One line for each depth, as Markdown; +- is the deviation of the seeds, x/ the factor of one standard error."""
    uses = {each.depth: each for each in uses}
    rows = []
    for depth in sorted({each.depth for each in rungs}):
        own = [each for each in rungs if each.depth == depth]
        losses = [each.bits_per_byte for each in own]
        spread = f" +- {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        factor, error = worth.get(depth, (None, None))
        use = uses[depth]
        rows.append(
            (
                str(depth),
                readable_number(own[0].parameters),
                readable_number(own[0].tokens),
                f"{own[0].flops:.2e}",
                f"{statistics.fmean(losses):.4f}{spread}",
                ("" if factor is None else f"{factor:.3f}") + ("" if error is None else f" x/ {error:.3f}"),
                f"{1000 * use.first_token_seconds:.1f} ms",
                f"{1000 * use.token_seconds:.2f} ms",
                readable_number(use.token_bytes) + "B",
            )
        )
    columns = (
        "depth",
        "parameters",
        "tokens",
        "FLOPs",
        "bits per byte",
        "multiplier",
        "first token",
        "a token",
        "read",
    )
    return "\n".join(markdown_table(columns, rows))


def plot(
    rungs: Sequence[Rung],
    uses: Sequence[Use],
    reference: Sequence[Rung],
    worth: dict[int, tuple[float, float | None]],
    file: Path,
) -> None:
    """Loss against compute with its curve, the multipliers, and loss against the time of a token."""
    from matplotlib.figure import Figure  # without pyplot: no display is needed

    figure = Figure(figsize=(13, 4), layout="constrained")
    against_compute, multiplier, against_time = figure.subplots(1, 3)
    for name, each in {"reference": reference, "this ladder": rungs}.items():
        flops, means, errors = means_by_depth(each)
        if name == "reference" and each is rungs:
            continue
        (line, *_) = against_compute.errorbar(flops, means, errors, fmt="o", capsize=3, label=name)
        if len(flops) >= 2:
            curve = Curve.through([r.flops for r in each], [r.bits_per_byte for r in each])
            grid = np.geomspace(min(flops), max(flops), 50)
            against_compute.plot(grid, [curve.loss(f) for f in grid], color=line.get_color(), linewidth=1)
    against_compute.set(xscale="log", xlabel="training FLOPs", ylabel="validation bits per byte")
    against_compute.legend()
    values, factors = [mean for mean, _ in worth.values()], [error or 1 for _, error in worth.values()]
    bars = [[m - m / f for m, f in zip(values, factors)], [m * f - m for m, f in zip(values, factors)]]
    multiplier.errorbar(list(worth), values, bars, fmt="o", color="C1", capsize=3)
    multiplier.axhline(1, color="0.6", linewidth=1)
    multiplier.set(xlabel="depth", ylabel="compute multiplier", xticks=[use.depth for use in uses])
    milliseconds, losses = [1000 * use.token_seconds for use in uses], means_by_depth(rungs)[1]
    against_time.plot(milliseconds, losses, "o-", color="C1")
    for use, time_, loss in zip(uses, milliseconds, losses):
        against_time.annotate(f"d{use.depth}", (time_, loss), textcoords="offset points", xytext=(5, 5))
    against_time.set(xlabel="milliseconds a token, one row", ylabel="validation bits per byte")
    against_time.margins(0.1)  # for the names beside the points
    figure.savefig(file, dpi=150, format="png")


def means_by_depth(rungs: Sequence[Rung]) -> tuple[list[float], list[float], list[float]]:
    """FLOPs, mean and standard error of the bits per byte of each depth, in order of depth."""
    groups = [[r for r in rungs if r.depth == depth] for depth in sorted({r.depth for r in rungs})]
    losses = [[r.bits_per_byte for r in group] for group in groups]
    errors = [statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else 0.0 for each in losses]
    return [group[0].flops for group in groups], [statistics.fmean(each) for each in losses], errors


def main() -> None:
    ladder, *groups = parse(LadderArguments, *RunSettings.CLASSES, refused=FOLLOWS | REFUSED)
    settings = RunSettings(*groups)
    arguments, config = settings.arguments, settings.config
    reference = reference_rungs(ladder.reference, ladder.depths) if ladder.reference else None
    inputs = [arguments.data, arguments.tokenizer, *([ladder.reference] if ladder.reference else [])]
    stage = Stage("ladder", config.output_dir, [ladder, *groups], inputs, arguments.rerun)
    if stage.is_done():
        return
    logging.disable_progress_bar()  # of reading the weights of runs that were done before
    runs = all_runs(settings, ladder, reference)
    flops = sum(each for _, each in runs)
    dtype = devices.choose_dtype(config.activation_dtype, config.device)
    expected = devices.expected_seconds(flops, config.device, dtype, config.world_size)
    stage.announce(runs=len(runs), flops=flops, seconds=expected)
    rungs = climb(stage, runs, ladder.max_hours)
    if is_main_process() and rungs:
        results = describe(rungs, reference or rungs, Path(config.output_dir))
        if len(rungs) == len(runs):
            stage.finish(results)


def all_runs(
    settings: RunSettings, ladder: LadderArguments, reference: Sequence[Rung] | None
) -> list[tuple[RunSettings, float]]:
    """The settings and FLOPs of every run, the cheapest first."""
    given = {each.depth: each.flops for each in reference or ()}
    vocabulary = len(load_tokenizer(settings.arguments.tokenizer))
    runs = []
    for depth in ladder.depths:
        for seed in ladder.seeds:
            own = rung_settings(settings, depth, seed, given.get(depth))
            runs.append((own, planned(own, own.network.network(vocabulary)).flops))
    return sorted(runs, key=lambda each: each[1])


def describe(rungs: Sequence[Rung], reference: Sequence[Rung], folder: Path) -> dict[str, Any]:
    """Measure what the networks cost to use, print the table, draw the picture; returns the figures for the record."""
    seeds = {each.depth: each.seed for each in reversed(rungs)}  # the first seed of each depth
    uses = [cost_of_use(folder_of(folder, depth, seed), depth) for depth, seed in sorted(seeds.items())]
    worth = multipliers(rungs, reference) if len({each.depth for each in reference}) >= 2 else {}
    print(table(rungs, uses, worth), flush=True)
    write_whole_file(folder / "ladder.png", lambda file: plot(rungs, uses, reference, worth, file))
    results: dict[str, Any] = {
        "rungs": [dataclasses.asdict(each) for each in rungs],
        "use": [dataclasses.asdict(each) for each in uses],
        "multipliers": {str(depth): {"mean": mean, "error": error} for depth, (mean, error) in worth.items()},
    }
    if worth:
        results["multiplier"] = math.exp(statistics.fmean(math.log(mean) for mean, _ in worth.values()))
    return results


if __name__ == "__main__":
    run(main)
