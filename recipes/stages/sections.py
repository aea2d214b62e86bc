"""One stage of a run in Markdown: what was planned, its picture, what came of it, figures, samples, settings."""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modeling_nanochat.recipes.stages.numbers import readable_number, readable_time
from modeling_nanochat.recipes.stages.sentences import sentence
from modeling_nanochat.recipes.stages.tables import (
    cell,
    figure_names,
    figure_text,
    is_interval,
    markdown_table,
    with_calls_shown,
)

Record = dict[str, Any]

# The order of a run, and what each stage is called in the report.
TITLES = {
    "data": "Data",
    "tokenizer": "Tokenizer",
    "pretrain": "Pretraining",
    "sft": "Supervised fine-tuning",
    "rl": "Reinforcement learning",
    "dpo": "Preference optimization",
    "eval": "Evaluation",
}
SAMPLES_SHOWN = 6  # of a stage
A_REPR = re.compile(r"\w+\(.*\)", re.DOTALL)


def title(record: Record) -> str:
    return TITLES.get(record["name"], record["name"])


def section(record: Record, picture: Path | None) -> str:
    """Everything about one stage: what was announced, its picture, figures, samples and settings."""
    lines = [f"## {title(record)}", ""]
    if said := sentence(record):
        lines += [said, ""]
    if record["announced"]:
        lines += [announcement(record["announced"]), ""]
    if picture is not None:
        lines += [f"![{title(record)}]({picture})", ""]
    lines += figures(record["results"])
    if record["samples"]:
        lines += ["", "### Samples", "", *samples(record["samples"])]
    if chosen := settings(record):
        lines += ["", "<details><summary>Settings that differ from the defaults</summary>", ""]
        lines += ["```json", json.dumps(chosen, indent=1, ensure_ascii=False), "```", "", "</details>"]
    return "\n".join(lines)


def settings(record: Record) -> Record:
    """What a person set: without what is empty, and without objects that a library makes of its own defaults."""
    return {
        name: value
        for name, value in record["arguments"].items()
        if value not in (None, "", [], {}) and not (isinstance(value, str) and A_REPR.fullmatch(value))
    }


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
    """Text with calculator calls as `[12 + 30 = 42]` and no other marks, safe in Markdown (no links or pictures)."""
    return re.sub(r"([\\`*_#<>|]|!(?=\[)|(?<=\])\()", r"\\\1", with_calls_shown(text))


def quotation(text: str) -> str:
    return "\n".join(f"> {line}  " if line else ">" for line in text.split("\n"))


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
