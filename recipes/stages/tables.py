"""Figures of models side by side and samples, as text for the terminal and as Markdown for the report.

A figure is a number or an interval; of a record that was read from its file, an interval is {"mean", "low", "high"}.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modeling_nanochat.eval.intervals import Interval

CALCULATION = re.compile(r"<\|python_start\|>(.*?)<\|python_end\|><\|output_start\|>(.*?)<\|output_end\|>", re.DOTALL)
MARK = re.compile(r"<\|\w+\|>")
LONGEST_CELL = 24  # characters; an interval has 20
Columns = Mapping[str, Mapping[str, Any]]  # by model, then by figure


def text_table(columns: Columns) -> str:
    """One line for each figure, one column for each model; what all models share in words (such as which tasks went
    in) below, once."""
    rows = {name: [cell(column, name) for column in columns.values()] for name in figure_names(columns)}
    shared = {name for name, cells in rows.items() if len(set(cells)) == 1 and len(cells[0]) > LONGEST_CELL}
    lines = [["", *columns], *([name, *cells] for name, cells in rows.items() if name not in shared)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    table = [
        "  ".join([line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:]))])
        for line in lines
    ]
    return "\n".join([*table, *(f"{name}: {rows[name][0]}" for name in rows if name in shared)])


def figure_names(columns: Columns) -> list[str]:
    """The figures that any of the columns has."""
    return list(dict.fromkeys(name for column in columns.values() for name in column))


def cell(figures: Mapping[str, Any], name: str) -> str:
    """A figure of one model, or a dash if it was not measured."""
    return figure_text(figures[name]) if name in figures else "-"


def plain_number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def figure_text(value: Any, number: Callable[[Any], str] = plain_number) -> str:
    """A figure as one reads it: an interval behind its mean, text and truth as they are, the rest by `number`."""
    if is_interval(value):
        value = value if isinstance(value, Interval) else Interval(**value)
        return f"{number(value.mean)} [{value.low:.3f}, {value.high:.3f}]"
    return number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def is_interval(value: Any) -> bool:
    """Whether this is an interval, or what a file keeps of one."""
    return isinstance(value, Interval) or (isinstance(value, dict) and set(value) == {"mean", "low", "high"})


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, the first column to the left and the others to the right."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"

    return [line(header), "|---|" + "---:|" * (len(header) - 1), *map(line, rows)]


def with_calls_shown(text: str) -> str:
    """A completion without special tokens, calls of the calculator as `[12 + 30 = 42]`."""
    return MARK.sub("", CALCULATION.sub(r"[\1 = \2]", text)).strip()
