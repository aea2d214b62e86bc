"""Judges many programs at once, from the evaluating process: `Sandbox` keeps workers, and refuses to work unsound.

    with Sandbox() as sandbox:
        verdicts = sandbox.judge(cases)

Every use begins with a self-test: a right solution, wrong ones, and one attack of each kind (`attacks`). If one of
them ends otherwise than it should, or if the system refuses a part of the isolation, `ValueError` says which and why in
one line. `allow_weak` accepts what the system refuses, but never an attack that works nor a missing filter of system
calls. The self-test costs about a second, a case about ten milliseconds.
"""

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

from . import attacks, bare, seccomp

MAX_WORKERS = 8
START_SECONDS = 60.0  # until a worker must have answered its first case, on a machine however busy
GRACE_SECONDS = 10.0  # beyond a case's own time limit, until a worker counts as hanging
TRIES = 2  # of a case whose worker was lost
PARTS = ("calls", "limits", "user", "files", "network", "processes")


@dataclass(frozen=True)
class Limits:
    """What a candidate may use.

    Attributes:
        seconds: of wall-clock time, for the program and all calls of its function together.
        memory_bytes: of address space; as there is one process, this is the total.
        file_bytes: of its folder in memory, in total.
        open_files: it may have at once.
    """

    seconds: float = 5.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 22
    open_files: int = 64


@dataclass(frozen=True)
class Case:
    """A program and the tests of a function that it defines.

    Attributes:
        program: foreign source text, executed on the inside as a module.
        function: name of the function in question.
        tests: trusted source text that defines `check(candidate)`; it may call the function by its name too.
        setup: trusted source text executed before the tests.
    """

    program: str
    function: str
    tests: str
    setup: str = ""


@dataclass(frozen=True)
class Verdict:
    """How a case ended.

    Attributes:
        passed: `check` returned.
        reason: why it did not pass, or "".
        missing: parts of the isolation that were not in force, with the system's reason.
    """

    passed: bool
    reason: str = ""
    missing: dict[str, str] = field(default_factory=dict)


class Sandbox:
    """Workers that judge cases; a context manager.

    Args:
        limits: for each case.
        workers: processes that work at once; by default one a core, up to 8.
        allow_weak: work even if the system refuses a part of the isolation.

    Attributes:
        missing: the parts of the isolation (`PARTS`) that the system refuses, with its reason.

    Raises:
        ValueError: this system cannot isolate programs (enough), or the self-test failed; one line.
    """

    def __init__(self, limits: Limits | None = None, workers: int | None = None, allow_weak: bool = False):
        if not seccomp.supported():
            machines = " or ".join(seccomp.MACHINES)
            raise ValueError(
                f"programs that nobody has read run only on Linux on {machines}, whose kernel can shut them in; "
                f"this is {sys.platform}. Use a Linux machine or container, or leave such tasks out."
            )
        self.limits, self.allow_weak = limits or Limits(), allow_weak
        count = workers or min(MAX_WORKERS, len(os.sched_getaffinity(0)))
        self._threads = ThreadPoolExecutor(count)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(_Worker(self.limits, allow_weak))
        self.missing: dict[str, str] = {}
        try:
            self._test_itself()
        except BaseException:
            self.close()
            raise

    @property
    def isolation(self) -> str:
        """What is in force, and what is not, in a line."""
        held = ", ".join(part for part in PARTS if part not in self.missing)
        return f"{held}; without {', '.join(self.missing)}" if self.missing else held

    def judge(self, cases: Sequence[Case]) -> list[Verdict]:
        """Verdicts in the order of the cases.

        Raises:
            ValueError: the system no longer gives the isolation that it gave at first.
        """
        return list(self._threads.map(self._judge_one, cases))

    def _judge_one(self, case: Case) -> Verdict:
        worker = self._idle.get()
        try:
            verdict = worker.judge(case)
        finally:
            self._idle.put(worker)
        if verdict.missing and not self.allow_weak:
            raise ValueError(
                f"this system does not isolate programs that nobody has read; refused: {describe(verdict.missing)}. "
                "Allow user namespaces, or run them all the same with --allow_weak_sandbox."
            )
        return verdict

    def _test_itself(self) -> None:
        first = self._judge_one(Case(*attacks.RIGHT))
        self.missing = first.missing
        if not first.passed:
            raise ValueError(f"the sandbox is broken: a right solution fails ({first.reason})")
        library = self._judge_one(Case(*attacks.RIGHT_WITH_LIBRARY))
        if not library.passed and "files" not in self.missing:
            raise ValueError(
                f"on the inside the standard library cannot be read ({library.reason}); let every user read "
                f"{os.path.dirname(os.__file__)} (chmod -R o+rX)"
            )
        with attacks.targets() as places:
            tried = attacks.all_attacks(places)
            verdicts = self.judge([Case(attack.program, "attack", attack.tests) for attack in tried])
        failed = [
            f"{attack.name} ({verdict.reason or 'passed'})"
            for attack, verdict in zip(tried, verdicts)
            if verdict.passed != attack.passes
        ]
        if failed:
            raise ValueError(f"the sandbox does not hold: {', '.join(failed)}")

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().stop()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def describe(missing: dict[str, str]) -> str:
    """Missing parts by the system's reason: "network, files (unshare: Operation not permitted)"."""
    parts: dict[str, list[str]] = {}
    for part, reason in missing.items():
        parts.setdefault(reason, []).append(part)
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in parts.items())


class _Worker:
    """One process of `outside`, started when it is needed and again when it is lost."""

    def __init__(self, limits: Limits, allow_weak: bool):
        self.limits = limits
        self.settings = json.dumps({"limits": asdict(limits), "allow_weak": allow_weak})
        self.process: subprocess.Popen | None = None

    def judge(self, case: Case) -> Verdict:
        for _ in range(TRIES):
            answer = self._ask(case)
            if answer is None:
                return Verdict(False, "the tests took too long")
            if "passed" in answer:
                return Verdict(**answer)
            self.stop()
        if "broken" in answer:  # before any line of the program had run
            raise ValueError(f"the sandbox is broken: {answer['broken']}")
        return Verdict(False, "its worker ended")

    def _ask(self, case: Case) -> dict | None:
        """The worker's answer, `{}` if it was lost, None if it hung."""
        seconds = self.limits.seconds + GRACE_SECONDS
        if self.process is None:
            seconds += START_SECONDS
            self.process = subprocess.Popen(
                bare.command("outside", self.settings),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
                env=bare.environment(), start_new_session=True,
            )  # fmt: skip
        try:
            self.process.stdin.write(json.dumps(asdict(case)).encode() + b"\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], seconds)[0]:
                self.stop()
                return None
            return json.loads(self.process.stdout.readline() or b"{}")
        except BrokenPipeError:
            return {}

    def stop(self) -> None:
        """End the process; the inside ends when it misses the outside."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            with contextlib.suppress(BrokenPipeError):  # what it did not read
                self.process.stdin.close()
            self.process.stdout.close()
            self.process = None
