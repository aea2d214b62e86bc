"""Writes the report of a run: what each stage did, its curves, samples, the machine, time and cost; or compares runs.

    nanochat report --config recipes/configs/demo/report.yaml
    nanochat report --run out/d20 --price_per_hour 24
    nanochat report --run out/d20 --run out/d20_wider      # curves over each other, figures and settings side by side

It reads the `stage.json` of every stage's folder and nothing else, so it can be made at any time, of unfinished runs
too. A report is a Markdown file with its pictures in a folder beside it, and the same as one web page that stands
alone. Cost is time times the price that you give, else the rent of the accelerator if it is a known one.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.stages.anchors import core_of_models, draw_anchors
from modeling_nanochat.recipes.stages.comparison import compare
from modeling_nanochat.recipes.stages.curves import draw_curves
from modeling_nanochat.recipes.stages.numbers import readable_time
from modeling_nanochat.recipes.stages.prices import ORIENTATION, dollars_per_hour
from modeling_nanochat.recipes.stages.record import read_stages, unfinished_stages
from modeling_nanochat.recipes.stages.sections import TITLES, Record, label, number, readable, section, title
from modeling_nanochat.recipes.stages.tables import figure_text, markdown_table
from modeling_nanochat.recipes.stages.web_page import web_page
from modeling_nanochat.training.whole_files import write_whole_file

# Figures by which a stage is known in the summary, the first of them that it has.
HEADLINES = {
    "data": ("sft/train.jsonl", "rl/train.jsonl"),
    "tokenizer": ("vocabulary", "bytes_per_token"),
    "pretrain": ("parameters", "tokens", "validation_bits_per_byte"),
    "sft": ("conversations", "validation_loss"),
    "rl": ("pass@1_before", "pass@1_after", "pass@8_before", "pass@8_after"),
    "eval": ("core", "bits_per_byte", "pass@1", "chat_core"),  # of the last model
}


class GatherRuns(argparse.Action):
    """`--run a b` and `--run a --run b` are the same, and take the place of the default."""

    given = False

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) if self.given else []), *values])
        self.given = True


@dataclass
class ReportArguments:
    """Which run or runs, and what an hour of the machine costs."""

    run: list[str] = field(
        default_factory=lambda: ["out/demo"],
        metadata={"help": "Folder whose subfolders are the stages; several are compared.", "action": GatherRuns},
    )
    output: str | None = field(
        default=None,
        metadata={"help": "The Markdown file, beside which the web page lies; report.md in the run's folder if unset, "
                          "comparison.md beside the first of several."},
    )  # fmt: skip
    price_per_hour: float | None = field(
        default=None, metadata={"help": "What the machine costs in an hour, for the cost of each stage."}
    )
    currency: str = field(default="$", metadata={"help": "Sign put in front of costs."})

    def __post_init__(self):
        if isinstance(self.run, str):  # as a config may have it
            self.run = [self.run]


def main() -> None:
    (arguments,) = parse(ReportArguments)
    file = write_report(arguments)
    print(f"[report] {file} and {file.with_suffix('.html')}, one page that can be sent to somebody")


def write_report(arguments: ReportArguments) -> Path:
    """Write the report, its pictures and its page; returns the path of the Markdown file.

    Raises:
        ValueError: no stage of a run has been finished, or a run is named twice.
    """
    folders = [Path(folder) for folder in arguments.run]
    if len(set(folders)) < len(folders):
        raise ValueError(f"--run names a run twice: {', '.join(arguments.run)}")
    records = [in_order(read_stages(folder)) for folder in folders]
    for folder in folders:
        if left_out := unfinished_stages(folder):
            print(f"[report] without {', '.join(left_out)} of {folder}")
    several = len(folders) > 1
    file = Path(arguments.output or (folders[0].parent / "comparison.md" if several else folders[0] / "report.md"))
    pictures = file.with_suffix("")
    if several:
        text = compare(dict(zip(short_names(folders), records)), pictures)
    else:
        text = report(arguments.run[0], records[0], arguments, pictures)
    write_whole_file(file, lambda path: path.write_text(text, encoding="utf-8"))
    page = web_page(text, file.parent)
    write_whole_file(file.with_suffix(".html"), lambda path: path.write_text(page, encoding="utf-8"))
    return file


def in_order(records: Sequence[Record]) -> list[Record]:
    """As the stages of a run follow each other; stages of other names come last."""
    order = list(TITLES)
    return sorted(records, key=lambda record: order.index(record["name"]) if record["name"] in order else len(order))


def short_names(folders: Sequence[Path]) -> list[str]:
    """What tells the folders from each other: their own names, with those above them if these are equal."""
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return ["/".join(folder.parts[-depth:]) for folder in folders]


def report(name: str, records: Sequence[Record], arguments: ReportArguments, pictures: Path) -> str:
    """The report of one run: a summary, then every stage."""
    parts = [summary(name, records, arguments)]
    for record in records:
        picture = draw_picture(record, pictures / f"{record['name']}.png")
        parts.append(section(record, picture.relative_to(pictures.parent) if picture else None))
    return "\n\n".join(parts) + "\n"


def draw_picture(record: Record, file: Path) -> Path | None:
    """The curves of a stage; of an evaluation with CORE where its models stand; None if there is nothing to draw."""
    core = core_of_models(record["results"]) if record["name"] == "eval" else {}
    return draw_anchors(core, file) if core else draw_curves(record, file)


# ---------------------------------------------------------------- the summary


def summary(name: str, records: Sequence[Record], arguments: ReportArguments) -> str:
    """Title, machine, date, one line for each stage, and what figures of one name have to do with each other."""
    prices = [arguments.price_per_hour or dollars_per_hour(record["machine"]) for record in records]
    costs = [None if price is None else record["seconds"] / 3600 * price for record, price in zip(records, prices)]
    rows = [[title(record), headline(record), readable_time(record["seconds"])] for record in records]
    rows.append(["**Together**", "", f"**{readable_time(sum(record['seconds'] for record in records))}**"])
    header = ["Stage", "Result", "Time"]
    if any(price is not None for price in prices):
        header.append("Cost")
        for row, amount in zip(rows, costs):
            row.append(money(amount, arguments.currency))
        rows[-1].append(f"**{money(sum(amount or 0 for amount in costs), arguments.currency)}**")
    machines = list(dict.fromkeys(describe_machine(record["machine"]) for record in records))
    lines = [f"# Report of {readable(name)}", "", f"{when(records)}Machine: {'; '.join(machines)}.", ""]
    lines += markdown_table(header, rows)
    if arguments.price_per_hour is not None:
        lines += ["", f"Costs are time times {arguments.currency}{arguments.price_per_hour:g} an hour."]
    elif "Cost" in header:
        lines += [
            "",
            f"Costs are time times the accelerator's rent ({ORIENTATION}); `--price_per_hour` sets another price.",
        ]
    else:
        lines += ["", "Costs are not known: no price was given (`--price_per_hour`)."]
    if left_out := unfinished_stages(Path(name)):
        lines += ["", f"Not in here: {readable(', '.join(left_out))}."]
    for line in twins(records):
        lines += ["", line]
    return "\n".join(lines)


def when(records: Sequence[Record]) -> str:
    """When the last stage ended, and by which code the stages were run, as far as their records say."""
    ends = sorted(record["finished"] for record in records if record.get("finished"))
    commits = list(dict.fromkeys(record["git"] for record in records if record.get("git")))
    date = f"Finished {ends[-1][:16].replace('T', ' ')}. " if ends else ""
    return date + (f"Code: {', then '.join(commits)}. " if commits else "")


def twins(records: Sequence[Record]) -> list[str]:
    """Why one model has two figures of one name, where it has."""
    found = {record["name"]: record for record in records}
    evaluated = list(found["eval"]["results"].values())[-1:] if "eval" in found else []
    measured = {name for figures in evaluated if isinstance(figures, dict) for name in figures}
    lines = []
    if "pretrain" in found and "bits_per_byte" in measured:
        lines.append(
            "Bits per byte are two measurements: pretraining's on packed rows, where documents are cut to fit, "
            "evaluation's on whole documents, the same bytes for every model; the second is for comparing models."
        )
    if "pass@1_after" in found.get("rl", {}).get("results", {}) and "pass@1" in measured:
        lines.append(
            "Reinforcement and evaluation draw their own samples for pass@1, of other numbers of held-out problems: "
            "two measurements of one model agree within their intervals."
        )
    return lines


def headline(record: Record) -> str:
    results, of = record["results"], ""
    if record["name"] == "eval" and results:
        name, results = list(results.items())[-1]
        of = f"{name}: "
    names = [name for name in HEADLINES.get(record["name"], ()) if name in results]
    return of + ", ".join(f"{label(name)} {figure_text(results[name], partial(number, name=name))}" for name in names)


def money(amount: float | None, currency: str) -> str:
    if amount is None:
        return "-"
    return f"{currency}{amount:.2f}" if amount >= 0.01 else f"< {currency}0.01"


def describe_machine(machine: Record) -> str:
    accelerators = machine["accelerators"]
    device = (
        f"{len(accelerators)} x {accelerators[0]}" if accelerators else f"{machine['cores']} cores of {machine['cpu']}"
    )
    processes = f", {machine['world_size']} processes" if machine["world_size"] > 1 else ""
    return f"{device}, {machine['memory_gib']} GiB{processes}, Python {machine['python']}, PyTorch {machine['torch']}"


if __name__ == "__main__":
    run(main)
