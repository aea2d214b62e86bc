"""Writes the report of a run: what each stage did, its curves, samples, the machine, time and cost.

    nanochat report --config recipes/configs/demo/report.yaml
    nanochat report --run out/d20 --price_per_hour 24

It reads the `stage.json` of every stage's folder and nothing else, so it can be made at any time, of unfinished runs
too. The report is one Markdown file with its pictures in a folder beside it. Cost is time times a price that you give.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.stages.anchors import core_of_models, draw_anchors
from modeling_nanochat.recipes.stages.curves import draw_curves
from modeling_nanochat.recipes.stages.record import FILE_NAME, readable_number, readable_time
from modeling_nanochat.recipes.stages.tables import (
    cell,
    figure_names,
    figure_text,
    is_interval,
    markdown_table,
    with_calls_shown,
)
from modeling_nanochat.training.whole_files import write_whole_file

Record = dict[str, Any]

# The order of a run, and what each stage is called in the report.
TITLES = {
    "data": "Data",
    "tokenizer": "Tokenizer",
    "pretrain": "Pretraining",
    "sft": "Supervised fine-tuning",
    "rl": "Reinforcement learning",
    "eval": "Evaluation",
}
SAMPLES_SHOWN = 6  # of a stage
# Figures by which a stage is known in the summary, the first of them that it has.
HEADLINES = {
    "data": ("sft/train.jsonl", "rl/train.jsonl"),
    "tokenizer": ("vocabulary", "bytes_per_token"),
    "pretrain": ("parameters", "tokens", "validation_bits_per_byte"),
    "sft": ("conversations", "validation_loss"),
    "rl": ("pass@1_before", "pass@1_after", "pass@8_before", "pass@8_after"),
    "eval": ("core", "bits_per_byte", "pass@1", "chat_core"),  # of the last model
}


@dataclass
class ReportArguments:
    """Which run, and what an hour of its machine costs."""

    run: str = field(default="out/demo", metadata={"help": "Folder whose subfolders are the stages."})
    output: str | None = field(default=None, metadata={"help": "The report; report.md in the run's folder if unset."})
    price_per_hour: float | None = field(
        default=None, metadata={"help": "What the machine costs in an hour, for the cost of each stage."}
    )
    currency: str = field(default="$", metadata={"help": "Sign put in front of costs."})


def main() -> None:
    (arguments,) = parse(ReportArguments)
    print(f"[report] {write_report(arguments)}")


def write_report(arguments: ReportArguments) -> Path:
    """Write the report and its pictures; returns its path.

    Raises:
        ValueError: no stage of the run has been finished.
    """
    records = read_records(Path(arguments.run))
    file = Path(arguments.output or Path(arguments.run) / "report.md")
    pictures = file.with_suffix("")
    sections = [summary(records, arguments)]
    for record in records:
        picture = draw_picture(record, pictures / f"{record['name']}.png")
        sections.append(section(record, picture.relative_to(file.parent) if picture else None))
    text = "\n\n".join(sections) + "\n"
    write_whole_file(file, lambda path: path.write_text(text, encoding="utf-8"))
    return file


def draw_picture(record: Record, file: Path) -> Path | None:
    """The curves of a stage; of an evaluation with CORE where its models stand; None if there is nothing to draw."""
    core = core_of_models(record["results"]) if record["name"] == "eval" else {}
    return draw_anchors(core, file) if core else draw_curves(record, file)


def read_records(run: Path) -> list[Record]:
    """Records of the finished stages in the order of a run; stages of other names come last."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(run.glob(f"*/{FILE_NAME}"))]
    if not records:
        raise ValueError(f"no stage has been finished in {run}; expected at least one {run}/*/{FILE_NAME}")
    order = list(TITLES)
    return sorted(records, key=lambda record: order.index(record["name"]) if record["name"] in order else len(order))


# ---------------------------------------------------------------- the summary


def summary(records: Sequence[Record], arguments: ReportArguments) -> str:
    """Title, machine, and one line for each stage."""
    total = sum(record["seconds"] for record in records)
    rows = [
        (title(record), headline(record), readable_time(record["seconds"]), cost(record["seconds"], arguments))
        for record in records
    ]
    rows.append(("**Together**", "", f"**{readable_time(total)}**", f"**{cost(total, arguments)}**"))
    machines = list(dict.fromkeys(describe_machine(record["machine"]) for record in records))
    lines = [f"# Report of {arguments.run}", "", "Machine: " + "; ".join(machines) + ".", ""]
    lines += markdown_table(("Stage", "Result", "Time", "Cost"), rows)
    if arguments.price_per_hour is None:
        lines += ["", "Costs are not known: no price was given (`--price_per_hour`)."]
    else:
        lines += ["", f"Costs are time times {arguments.currency}{arguments.price_per_hour:g} an hour."]
    return "\n".join(lines)


def title(record: Record) -> str:
    return TITLES.get(record["name"], record["name"])


def headline(record: Record) -> str:
    results, of = record["results"], ""
    if record["name"] == "eval" and results:
        name, results = list(results.items())[-1]
        of = f"{name}: "
    names = [name for name in HEADLINES.get(record["name"], ()) if name in results]
    return of + ", ".join(f"{label(name)} {figure_text(results[name], partial(number, name=name))}" for name in names)


def cost(seconds: float, arguments: ReportArguments) -> str:
    if arguments.price_per_hour is None:
        return "-"
    amount = seconds / 3600 * arguments.price_per_hour
    return f"{arguments.currency}{amount:.2f}" if amount >= 0.01 else f"< {arguments.currency}0.01"


def describe_machine(machine: Record) -> str:
    accelerators = machine["accelerators"]
    device = (
        f"{len(accelerators)} x {accelerators[0]}" if accelerators else f"{machine['cores']} cores of {machine['cpu']}"
    )
    processes = f", {machine['world_size']} processes" if machine["world_size"] > 1 else ""
    return f"{device}, {machine['memory_gib']} GiB{processes}, Python {machine['python']}, PyTorch {machine['torch']}"


# ---------------------------------------------------------------- one stage


def section(record: Record, picture: Path | None) -> str:
    """Everything about one stage: what was announced, its picture, figures, samples and settings."""
    lines = [f"## {title(record)}", ""]
    if record["announced"]:
        lines += [announcement(record["announced"]), ""]
    if picture is not None:
        lines += [f"![{title(record)}]({picture})", ""]
    lines += figures(record["results"])
    if record["samples"]:
        lines += ["", "### Samples", "", *samples(record["samples"])]
    if record["arguments"]:
        settings = json.dumps(record["arguments"], indent=1, ensure_ascii=False)
        lines += ["", "<details><summary>Settings that differ from the defaults</summary>", ""]
        lines += ["```json", settings, "```", "", "</details>"]
    return "\n".join(lines)


def announcement(facts: Record) -> str:
    return "Planned: " + ", ".join(f"{label(name)} {number(value, name)}" for name, value in facts.items()) + "."


def figures(results: Record) -> list[str]:
    """A table of the results; of several models side by side if the results are grouped by model."""
    groups = {name: value for name, value in results.items() if isinstance(value, dict) and not is_interval(value)}
    if groups:
        rows = [(label(name), *(cell(group, name) for group in groups.values())) for name in figure_names(groups)]
        return markdown_table(("", *groups), rows)
    shown = {name: value for name, value in results.items() if not isinstance(value, list)}
    rows = [(label(name), figure_text(value, partial(number, name=name))) for name, value in shown.items()]
    return markdown_table(("Figure", "Value"), rows)


def samples(records: Sequence[Record]) -> list[str]:
    """Questions and answers as quotations; of many, some of each kind."""
    chosen: dict[tuple, list[Record]] = {}
    for record in records:
        chosen.setdefault((record.get("model"), record.get("task"), record.get("step")), []).append(record)
    each = max(1, SAMPLES_SHOWN // len(chosen))
    lines = []
    for (model, task, step), group in chosen.items():
        about = ", ".join(str(part) for part in (model, task, f"step {step}" if step is not None else None) if part)
        lines += [f"**{about}**", ""] if about else []
        for record in group[:each]:
            question = record.get("question", record.get("prompt", ""))
            answer = record.get("completion", (record.get("completions") or [""])[0])
            right = record.get("right", (record.get("correct") or [None])[0])
            verdict = "" if right is None else (" ✓" if right else " ✗")
            lines += [quotation(f"**{readable(question)}** {readable(answer)}{verdict}"), ""]
    return lines[:-1]


def readable(text: str) -> str:
    """Text with calculator calls as `[12 + 30 = 42]` and without other marks, safe in Markdown."""
    return re.sub(r"([\\`*_#<>|])", r"\\\1", with_calls_shown(text))


def quotation(text: str) -> str:
    return "\n".join(f"> {line}  " if line else ">" for line in text.split("\n"))


# ---------------------------------------------------------------- words and numbers


def label(name: str) -> str:
    return name if "/" in name else name.replace("_", " ")


def number(value: Any, name: str = "") -> str:
    """A figure as one reads it: 4.47 M, 2 min 40 s, 0.987, or the text it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if name == "seconds":
        return readable_time(value)
    if abs(value) >= 10_000:
        unit = {"bytes": "B", "flops": "FLOP"}.get(name, "")
        return (readable_number(value) + unit).strip()
    return f"{value}" if isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    run(main)
