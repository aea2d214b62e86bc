"""Several runs beside each other: for each stage that more than one of them has, their curves over each other, their
figures in columns, and the settings in which they differ."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modeling_nanochat.recipes.stages.curves import draw_curves_together
from modeling_nanochat.recipes.stages.numbers import readable_time
from modeling_nanochat.recipes.stages.sections import Record, label, number, readable, settings, title
from modeling_nanochat.recipes.stages.tables import figure_names, figure_text, is_interval, markdown_table

Runs = Mapping[str, Sequence[Record]]  # the records of each run, by its folder


def compare(runs: Runs, pictures: Path) -> str:
    """The comparison in Markdown; its pictures are written into the folder `pictures`."""
    stages: dict[str, dict[str, Record]] = {}  # by the stage, then by the run
    for run, records in runs.items():
        names = [record["name"] for record in records]
        for record in records:
            name = record["name"]
            stages.setdefault(name if names.count(name) == 1 else f"{name}_{record['folder']}", {})[run] = record
    parts = [f"# Comparison of {', '.join(map(readable, runs))}"]
    for name, records in stages.items():
        if len(records) == 1:
            (run,) = records
            where = records[run]["folder"]
            parts.append(f"## {title(records[run])} ({readable(where)})\n\nOnly {readable(run)} has this stage.")
            continue
        picture = draw_curves_together(records, pictures / f"{name}.png")
        parts.append(stage_side_by_side(records, picture.relative_to(pictures.parent) if picture else None))
    return "\n\n".join(parts) + "\n"


def stage_side_by_side(records: Mapping[str, Record], picture: Path | None) -> str:
    heading = title(next(iter(records.values())))
    lines = [f"## {heading}", ""]
    if picture is not None:
        lines += [f"![{heading}]({picture})", ""]
    columns = {run: plain_figures(record) for run, record in records.items()}
    rows = []
    for name in figure_names(columns):
        values = [figure_text(column[name], partial(number, name=name)) if name in column else "-"
                  for column in columns.values()]  # fmt: skip
        rows.append((readable(label(name)), *values))
    rows.append(("time", *(readable_time(record["seconds"]) for record in records.values())))
    lines += markdown_table(("", *map(readable, columns)), rows)
    different = differences(records)
    if different:
        lines += ["", "Settings that differ:", "", *markdown_table(("", *map(readable, records)), different)]
    else:
        lines += ["", "The settings are the same."]
    return "\n".join(lines)


def plain_figures(record: Record) -> dict[str, Any]:
    """Figures of a stage by name; of an evaluation `model: figure` for each of its models."""
    figures = {}
    for name, value in record["results"].items():
        if isinstance(value, dict) and not is_interval(value):
            figures |= {f"{name}: {inner}": each for inner, each in value.items()}
        elif not isinstance(value, list):
            figures[name] = value
    return figures


def differences(records: Mapping[str, Record]) -> list[tuple[str, ...]]:
    """Rows of settings and inputs that are not the same in all runs; a dash is a default."""
    chosen = [settings(record) | inputs(record) for record in records.values()]
    names = list(dict.fromkeys(name for each in chosen for name in each))
    rows = [
        (readable(name), *(readable(shown(each[name])) if name in each else "-" for each in chosen)) for name in names
    ]
    return [row for row in rows if len(set(row[1:])) > 1]


def inputs(record: Record) -> dict[str, str]:
    """What a stage read, by the hash of its contents: folders of different runs have different names anyway."""
    found = record.get("inputs", {}).items()
    return {f"input {Path(path).name}": state for path, state in found if state != "by name"}


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
