"""Rows as they come => a JSON lines file in a fixed random order, with memory that stays flat.

    rows  ->  lines of a temporary file, in the order they come  ->  their places, shuffled  ->  lines in that order

Only the places are held, 8 bytes a row; one that repeats is written once and has several places. The price is the disk
space of the lines twice until they are copied, and a read at a random place for every row.
"""

import json
import random
import tempfile
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class ShuffledFile:
    """Takes rows in any number, then writes them in the order that a seed gives.

    Args:
        folder: where the temporary file lies, which no one sees and which is gone with this process.
        rows: the first ones.
    """

    def __init__(self, folder: Path, rows: Iterable[dict[str, Any]] = ()):
        self.lines = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (`write` closes it)
        self.places = array("q")
        for row in rows:
            self.add(row)

    def add(self, row: dict[str, Any], times: int = 1) -> None:
        self.places.extend([self.lines.tell()] * times)
        self.lines.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def write(self, file: Path, seed: int) -> None:
        """Writes `file`; the order is that in which the seed shuffles a list of as many rows."""
        random.Random(seed).shuffle(self.places)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as copy, self.lines as lines:
            for place in self.places:
                lines.seek(place)
                copy.write(lines.readline())
