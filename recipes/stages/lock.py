"""One process at a time in a folder: a lock that says who holds it.

The lock is a file with the host, the process and its start. A process that is gone leaves it behind; on the same host
that shows, and the next one takes it over. On another host it cannot be told, so the sentence says which file to
remove. The price of a file over the system's own locks: none of those is safe on every network file system. Where they
work, one of them covers the moment of taking, so that two processes cannot both take a lock over.
"""

import atexit
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "stage.lock"


def take(folder: Path, name: str = NAME) -> Path:
    """Lock a folder (or with a `name` of its own, a part of it) for this process until it ends or `release` is called.

    Raises:
        ValueError: another process is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    own = {"host": socket.gethostname(), "process": os.getpid(), "started": started(os.getpid())}
    with alone(folder):
        holder = read(file)
        if holder != own and alive(holder, own["host"]):
            raise ValueError(
                f"process {holder.get('process')} on {holder.get('host')} is at work in {folder}; expected to wait "
                f"for its end, another output_dir, or, if it is no longer there, {file} to be removed"
            )
        if holder != own:
            file.unlink(missing_ok=True)  # its process is gone
            with open(file, "x", encoding="utf-8") as opened:
                json.dump(own, opened)
    atexit.register(release, file)
    return file


@contextmanager
def held(folder: Path, name: str) -> Iterator[None]:
    """The lock of a part of a folder, as long as the block lasts."""
    file = take(folder, name)
    try:
        yield
    finally:
        release(file)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process of this host at a time, where the file system knows such locks; nobody is waited for longer than for
    the few instructions that are done in here."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        for _ in range(50):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
                continue
            except OSError:  # there are no such locks
                pass
            break
        yield
    finally:
        os.close(descriptor)


def release(file: Path) -> None:
    """Give a lock back, if it is still this process's own."""
    if read(file).get("process") == os.getpid():
        file.unlink(missing_ok=True)


def read(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def alive(holder: dict, host: str) -> bool:
    """Whether the holder may still be at work; on another host one has to assume it. An unreadable lock is nobody's."""
    if not holder:
        return False
    return holder.get("host") != host or started(holder.get("process", -1)) == holder.get("started", "")


def started(process: int) -> str | None:
    """When a process of this host started, in the kernel's count; None if there is none (or no /proc: then only that
    it lives is known)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    if Path("/proc").is_dir():
        return None
    try:
        os.kill(process, 0)
        return "alive"
    except OSError:
        return None
