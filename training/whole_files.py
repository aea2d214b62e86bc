"""One way to write a file and one to fill a folder: whole or not at all, and on the disk before anything is renamed.

Everything is written under a name that no reader looks for, flushed, and renamed. A process may be killed at any
moment; the price is one pass of flushing. All ranks must see the same file system.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STAGING = ".incomplete"


def write_whole_file(file: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file under a temporary name beside it, then put it in its place."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.incomplete")
    write(temporary)
    flush(temporary)
    os.replace(temporary, file)
    flush(file.parent, recursive=False)


def write_json(file: str | Path, record: Any) -> None:
    """`record` as indented JSON. A number that is not finite is an error: JSON has none."""
    text = json.dumps(record, indent=1, default=as_json, allow_nan=False) + "\n"
    write_whole_file(file, lambda path: path.write_text(text, encoding="utf-8"))


def as_json(value: Any) -> Any:
    """A dataclass (such as an interval) by its fields, anything else JSON does not know as text."""
    return vars(value) if dataclasses.is_dataclass(value) else str(value)


@contextmanager
def whole_folder(
    target: str | Path, *, is_main_process: bool = True, barrier: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends on all ranks.

    Args:
        target: where the folder is to appear; what is there already is replaced.
        is_main_process: whether this process does the renaming; exactly one does.
        barrier: waits for all ranks.
    """
    target = Path(target)
    staging = target.parent / STAGING
    if is_main_process:
        shutil.rmtree(staging, ignore_errors=True)  # what a killed process left behind
        (staging / target.name).mkdir(parents=True)
    barrier()
    try:
        yield staging / target.name
    except BaseException:
        if is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    barrier()
    if is_main_process:
        flush(staging / target.name)
        if target.exists():
            os.rename(target, staging / "replaced")
        os.rename(staging / target.name, target)
        flush(target.parent, recursive=False)
        shutil.rmtree(staging)
    barrier()


def replace_files(folder: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill an empty folder, then move its files one by one over those of `folder`, each of them whole."""
    folder = Path(folder)
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    write(staging)
    flush(staging)
    for file in sorted(staging.rglob("*")):
        if file.is_file():
            destination = folder / file.relative_to(staging)
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, destination)
    shutil.rmtree(staging)


def flush(path: Path, recursive: bool = True) -> None:
    """Make sure that a file, or the names in a folder and with `recursive` all below it, have reached the disk."""
    for each in [path, *(path.rglob("*") if recursive and path.is_dir() else ())]:
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
