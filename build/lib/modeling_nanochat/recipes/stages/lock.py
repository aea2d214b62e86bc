"""One process at a time in a folder: a lock that says who holds it.

The lock is a file that is made only if it is not there, with the host, the process and its start. A process that is
gone leaves it behind; on the same host that shows, and the next one takes it over. On another host it cannot be told,
so the sentence says which file to remove. The price of a file over the system's own locks: none of those is safe on
every network file system.
"""

import atexit
import json
import os
import socket
from pathlib import Path

NAME = "stage.lock"


def take(folder: Path) -> Path:
    """Lock a folder for this process until it ends or `release` is called.

    Raises:
        ValueError: another process is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / NAME
    own = {"host": socket.gethostname(), "process": os.getpid(), "started": started(os.getpid())}
    for _ in range(2):
        try:
            with open(file, "x", encoding="utf-8") as opened:
                json.dump(own, opened)
            atexit.register(release, file)
            return file
        except FileExistsError:
            holder = read(file)
            if holder == own:
                return file
            if alive(holder, own["host"]):
                raise ValueError(
                    f"process {holder.get('process')} on {holder.get('host')} is at work in {folder}; expected to wait "
                    f"for its end, another output_dir, or, if it is no longer there, {file} to be removed"
                ) from None
            file.unlink(missing_ok=True)  # its process is gone
    raise ValueError(f"{file} appears again as soon as it is removed: another process starts in {folder} too")


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
