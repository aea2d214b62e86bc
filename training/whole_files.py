"""One way to write a file and one to fill a folder: whole or not at all, and on the disk before anything is renamed.

Everything is written under a name that no reader looks for, flushed, and renamed. A process may be killed at any
moment; the price is one pass of flushing. All ranks must see the same file system.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STAGING = ".incomplete"
CHECKSUMS = "checksums.json"
FULL_BELOW = 1 << 20  # bytes: a disk with less than that left is taken to be why a write failed


def write_whole_file(file: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file under a temporary name beside it, then put it in its place."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.incomplete")
    try:
        with full_disk_said(file.parent):
            write(temporary)
            flush(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)  # it may be what fills the disk
        raise
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
    target: str | Path,
    *,
    is_main_process: bool = True,
    barrier: Callable[[], None] = lambda: None,
    seal: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends on all ranks.

    Args:
        target: where the folder is to appear; what is there already is replaced.
        is_main_process: whether this process does the renaming; exactly one does.
        barrier: waits for all ranks.
        seal: called with the folder by the main process when all ranks have written, such as `write_checksums`.
    """
    target = Path(target)
    staging = target.parent / STAGING / target.name  # others may be written beside it
    replaced = staging.with_name(f"{target.name}.replaced")
    if is_main_process:
        remove_staging(staging, replaced)  # what a killed process left behind
        staging.mkdir(parents=True)
    barrier()
    try:
        with full_disk_said(target.parent):
            yield staging
            barrier()
            if is_main_process:
                if seal is not None:
                    seal(staging)
                flush(staging)
    except BaseException:
        if is_main_process:
            remove_staging(staging)
        raise
    if is_main_process:
        if target.exists():
            os.rename(target, replaced)
        os.rename(staging, target)
        flush(target.parent, recursive=False)
        remove_staging(replaced)
    barrier()


def remove_staging(*folders: Path) -> None:
    """Delete folders in a folder for what is not whole, and that one too if nothing else is in it."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # another process writes there, or it is gone
        folders[0].parent.rmdir()


@contextmanager
def full_disk_said(folder: Path) -> Iterator[None]:
    """Libraries report a full disk each in their own words, such as a position in a file: here it is said in ours."""
    try:
        yield
    except ValueError:  # about what is to be written
        raise
    except Exception as error:
        numbers = (errno.ENOSPC, errno.EDQUOT)
        full = getattr(error, "errno", None) in numbers or any(os.strerror(each) in str(error) for each in numbers)
        if full or shutil.disk_usage(folder).free < FULL_BELOW:
            raise OSError(
                f"the disk is full: {folder} could not be written ({type(error).__name__}); what was whole before is "
                "kept; expected free space, or another output_dir"
            ) from error
        raise


def replace_files(folder: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill an empty folder, then move its files one by one over those of `folder`, each of them whole."""
    folder = Path(folder)
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with full_disk_said(staging):
            write(staging)
            flush(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    for file in sorted(staging.rglob("*")):
        if file.is_file():
            destination = folder / file.relative_to(staging)
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, destination)
    shutil.rmtree(staging)


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sampled_hash(file: Path, whole_below: int = 1 << 24) -> str:
    """Size and hash of a file: of all of it if it is small, else of 17 pieces of 64 KB spread over it. Tells a
    replaced, shortened or lengthened file; a single byte changed in a large one may go unnoticed."""
    size = file.stat().st_size
    if size < whole_below:
        return f"{size}:{sha256(file)}"
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        for piece in range(17):
            opened.seek(piece * (size - (1 << 16)) // 16)
            digest.update(opened.read(1 << 16))
    return f"{size}:{digest.hexdigest()}"


def checksums(folder: Path, wanted: Callable[[Path], bool] = lambda path: True) -> dict[str, str]:
    """sha256 of every file below a folder, by its relative name; of those whose relative path is `wanted`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    names = [path.relative_to(folder) for path in files]
    return {name.as_posix(): sha256(folder / name) for name in names if wanted(name)}


def write_checksums(folder: Path) -> None:
    """Write what `damage` holds the folder against."""
    write_json(folder / CHECKSUMS, checksums(folder))


def damage(folder: Path, expected: dict[str, str] | None = None) -> str | None:
    """What is wrong with a folder, in a few words; None if every file is what its checksum says.

    Args:
        folder: it may hold more than is looked at.
        expected: sha256 by relative name; by default from the folder's own checksums.
    """
    if expected is None:
        try:
            expected = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return f"it has no readable {CHECKSUMS}"
    for name, digest in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if sha256(file) != digest:
            return f"{name} has changed since it was written"
    return None


def flush(path: Path, recursive: bool = True) -> None:
    """Make sure that a file, or the names in a folder and with `recursive` all below it, have reached the disk."""
    for each in [path, *(path.rglob("*") if recursive and path.is_dir() else ())]:
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
