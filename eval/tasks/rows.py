"""The form of a row, and how rows are read from files.

A row is a dictionary. A conversation has `messages`; a problem has `messages` (the question, then a solution) and
`answer`, what a checker compares with; a lettered question has `question`, `choices` and `answer`, the index of one.
Every generator in this folder yields such rows, and every file of them is JSON lines, read here.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Row = dict[str, Any]
Read = TypeVar("Read")
SHOWN = 80  # characters of a bad line in its error


def read_rows(file: str | Path, take: Callable[[Row], Read], expected: str) -> list[Read]:
    """`take(row)` of every line of a JSON lines file; empty lines are skipped.

    Args:
        take: what is wanted of a row; for one that it cannot use it raises KeyError, IndexError, TypeError,
            AttributeError or ValueError.
        expected: how a line has to look, for the error.

    Raises:
        ValueError: the file is missing or empty, or a line is not as expected; the message shows where.
    """
    if not Path(file).is_file():
        raise ValueError(f"{file} does not exist; expected JSON lines, each {expected}")
    taken = []
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                taken.append(take(json.loads(line.decode("utf-8"))))
            except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
                shown = line.decode("utf-8", errors="replace").rstrip()[:SHOWN]
                raise ValueError(
                    f"{file}:{number}: {reason_of(error)}; expected {expected} in one line, got {shown!r}"
                ) from error
    if not taken:
        raise ValueError(f"{file} is empty; expected at least one line, {expected}")
    return taken


def reason_of(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON ({error.msg} at character {error.pos})"
    if isinstance(error, UnicodeDecodeError):
        return f"no UTF-8 (byte {error.object[error.start]:#04x} at {error.start})"
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
