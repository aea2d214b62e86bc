"""Runs programs that nobody has read, and says whether they ran to their end.

The program runs in a process of its own (`inside.py`): an isolated interpreter, an empty environment, a
temporary folder to work in, limits on memory, processor time, processes, file size and open files. Where Linux allows
it to an ordinary user, namespaces leave it no network and no other process to see or to kill, and Landlock no file
but the interpreter's and its own. At the time limit, or when the program ends, everything it started is killed.

A program has passed when a random token comes back, which lies unread in a pipe until its last line has been executed.
So nothing passes by leaving early, by printing what a success would print, or by reaching into an object that holds the
result. A program may still cheat its tests from within, say with an object that equals everything: a sandbox protects
the machine and the verdict, not the tests.

It is not a virtual machine. `SandboxResult.isolation` names what was in force; on a system that refuses namespaces or
Landlock (and outside Linux) run it only inside a container that holds nothing of value. A run costs about 0.1 s, most
of it the start of an interpreter.
"""

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("inside.py")
MAX_REPORT_BYTES = 4096  # what the child may send back: a line about its isolation and the token
MAX_OUTPUT_CHARACTERS = 4000  # of what the program printed, kept from the end


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: of wall-clock time, the start of the interpreter included.
        memory_bytes: of address space.
        file_bytes: of any file it writes; what it prints goes to a file too.
        processes: it may have at once.
        open_files: it may have at once.
    """

    seconds: float = 5.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 22
    processes: int = 16
    open_files: int = 64


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended.

    Attributes:
        passed: it ran to its last line.
        timed_out: it was killed at the time limit.
        output: the end of what it printed, errors included.
        isolation: what was in force: "user" (not root: the limit on processes holds), "network" (there is none),
            "processes" (it sees and signals no others), "files" (it reads and writes no others).
    """

    passed: bool
    timed_out: bool
    output: str
    isolation: tuple[str, ...]


def run_program(program: str, limits: Limits | None = None) -> SandboxResult:
    """Run the text of a Python program and say whether it got to its end.

    Args:
        program: source text; it has no input and no arguments.
        limits: what it may use.
    """
    limits = limits or Limits()
    token = secrets.token_hex(16).encode()
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
        output = Path(folder, "output.txt")
        output.touch()
        work = Path(folder, "work")
        work.mkdir()
        (work / "program.py").write_text(program, encoding="utf-8", errors="replace")
        report, timed_out = _run_child(str(output), str(work), limits, token)
        with output.open("rb") as printed:
            printed.seek(max(0, output.stat().st_size - MAX_OUTPUT_CHARACTERS))
            text = printed.read().decode("utf-8", errors="replace")
    isolation, separator, end = report.partition(b"\n")
    names = tuple(isolation.decode("ascii", errors="replace").split()) if separator else ()
    return SandboxResult(end == token, timed_out, text, names)


def _run_child(output: str, work: str, limits: Limits, token: bytes) -> tuple[bytes, bool]:
    """What the child reported, and whether it had to be killed at the time limit."""
    settings = json.dumps({"output": output, "work": work, "limits": vars(limits)})
    child = subprocess.Popen(
        [sys.executable, "-I", str(CHILD), settings],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=work,
        env={},
        start_new_session=True,
    )
    try:
        with child.stdin as pipe:
            pipe.write(token)
        return _read_report(child, time.monotonic() + limits.seconds)
    except BrokenPipeError:  # the child could not even start
        return b"", False
    finally:
        _kill_group(child)


def _read_report(child: subprocess.Popen, deadline: float) -> tuple[bytes, bool]:
    """Everything up to the end of the pipe, but no more than is due and not beyond the deadline."""
    report = b""
    while len(report) < MAX_REPORT_BYTES:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not select.select([child.stdout], [], [], remaining)[0]:
            return report, True
        piece = os.read(child.stdout.fileno(), MAX_REPORT_BYTES)
        if not piece:
            break
        report += piece
    return report, False


def _kill_group(child: subprocess.Popen) -> None:
    """Kill the child and its group; it is reaped only afterwards, so its id cannot have been given to another."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
