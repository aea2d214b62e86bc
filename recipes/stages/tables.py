"""Figures of models side by side, as text for the terminal and as Markdown for the report.

A figure `x` may have a confidence interval, `x_low` and `x_high` beside it; it is shown in the same cell.
"""

import re
from collections.abc import Mapping, Sequence

Columns = Mapping[str, Mapping[str, float]]  # by model, then by figure
BOUND = re.compile(r"_(low|high)(_before|_after)?$")


def text_table(columns: Columns) -> str:
    """One line for each figure, one column for each model."""
    lines = [["", *columns]]
    lines += [[name, *(cell(column, name) for column in columns.values())] for name in figure_names(columns)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:]))])
        for line in lines
    )


def figure_names(columns: Columns) -> list[str]:
    """The figures that any of the columns has, without the bounds of intervals."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return [name for name in names if not BOUND.search(name)]


def cell(figures: Mapping[str, float], name: str) -> str:
    """A figure of one model with its interval, or a dash if it was not measured."""
    if name not in figures:
        return "-"
    text = f"{figures[name]:.3f}"
    if f"{name}_low" in figures:
        text += f" [{figures[f'{name}_low']:.3f}, {figures[f'{name}_high']:.3f}]"
    return text


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, the first column to the left and the others to the right."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"

    return [line(header), "|---|" + "---:|" * (len(header) - 1), *map(line, rows)]
