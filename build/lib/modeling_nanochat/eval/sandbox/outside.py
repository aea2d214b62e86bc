"""The outside: a worker that runs the tests of one case after another, and asks the candidate by literals.

The tests are trusted, being the data set's. They run here as they stand, with a stand-in under the function's name and
as `check`'s argument. What comes back from a candidate is a literal of the plain types, or an exception of the class
it raised if that is one of Python's own. A candidate that stops answering, sends something else or takes too long has
failed, whatever the tests make of it.
"""

import builtins
import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from . import bare
from .literals import BrokenMessage, Channel, NotLiteral, decode, encode

MAX_REASON_CHARACTERS = 500


class Failed(Exception):
    """The case is decided: the candidate has failed. Its words are the reason."""


def main() -> None:
    """Argument: `{"limits", "allow_weak"}`. Standard input and output: cases and verdicts. All JSON, one a line."""
    settings = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)  # tests may print
    zygote = Zygote(settings["limits"])
    for line in sys.stdin:
        verdict = run_case(zygote, json.loads(line), settings["limits"]["seconds"], settings["allow_weak"])
        print(json.dumps(verdict), file=replies, flush=True)


class Zygote:
    """The inside, seen from here."""

    def __init__(self, limits: dict[str, float]):
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = subprocess.Popen(
            bare.command("inside", json.dumps(limits)),
            stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", env=bare.environment(),
        )  # fmt: skip
        theirs.close()
        message = self.control.recv(16)
        if message == b"map":
            map_users(self.process.pid)
            self.control.send(b"mapped")
            message = self.control.recv(16)
        if message != b"ready":
            raise RuntimeError("the inside of the sandbox did not start")

    def fork(self, deadline: float) -> Channel:
        read_answers, write_answers = os.pipe()
        read_calls, write_calls = os.pipe()
        socket.send_fds(self.control, [b"fork"], [read_calls, write_answers])
        os.close(read_calls)
        os.close(write_answers)
        return Channel(read_answers, write_calls, deadline)

    def end(self, channel: Channel) -> int:
        """Kill the candidate; returns the status it ended with."""
        self.control.send(b"end")
        status = int(self.control.recv(16))
        os.close(channel.read_from)
        os.close(channel.write_to)
        return status


def map_users(process: int) -> None:
    """Give a process in a new user namespace all ids that exist here, if that is allowed, or else its own only."""
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        with open(f"/proc/self/{kind}_map") as ours:
            extents = [line.split() for line in ours]
        every_id = "".join(f"{start} {start} {count}\n" for start, _, count in extents)
        try:
            _write(f"/proc/{process}/{kind}_map", every_id)
        except OSError:
            if kind == "gid":
                _write(f"/proc/{process}/setgroups", "deny")
            _write(f"/proc/{process}/{kind}_map", f"{own} {own} 1\n")


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


class Candidate:
    """What the tests call: passes arguments and results on, and remembers whether the other side kept to the form."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self.calls = 0
        self.failure = ""

    def __call__(self, *positional: Any, **keywords: Any) -> Any:
        self.calls += 1
        try:
            return self.ask({"positional": encode(list(positional)), "keywords": encode(keywords)})
        except NotLiteral as error:
            raise self.fail(f"was given no literal: {error}") from error

    def ask(self, request: dict[str, Any]) -> Any:
        reply = self.exchange(request)
        if "value" in reply:
            try:
                return decode(reply["value"])
            except NotLiteral as error:
                raise self.fail(str(error)) from error
        if isinstance(reply.get("refused"), str):
            raise self.fail(f"returned no literal: {reply['refused']}")
        if isinstance(reply.get("raised"), str) and isinstance(reply.get("words"), str):
            raise _exception(reply["raised"], reply["words"])
        raise self.fail("a malformed message")

    def exchange(self, request: dict[str, Any] | None) -> dict[str, Any]:
        if self.failure:
            raise Failed(self.failure)
        try:
            if request is not None:
                self.channel.send(request)
            return self.channel.receive()
        except BrokenMessage as error:
            raise self.fail(str(error)) from error

    def fail(self, reason: str) -> Failed:
        self.failure = reason[:MAX_REASON_CHARACTERS]
        return Failed(self.failure)


def _exception(name: str, words: str) -> Exception:
    """The candidate's exception, as one of Python's own or as `Failed`."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(words)
        except TypeError:  # UnicodeDecodeError and its like take five arguments
            pass
    return Failed(f"{name}: {words}")


def run_case(zygote: Zygote, case: dict[str, str], seconds: float, allow_weak: bool) -> dict[str, Any]:
    """`{"passed", "reason", "missing"}`, or `{"broken": why}` if the inside could not shut itself in.

    Where parts of the isolation are missing and that is not allowed, the program does not run.
    """
    candidate = Candidate(zygote.fork(time.monotonic() + seconds))
    missing = None
    try:
        greeting = candidate.exchange(None)
        if "failed" in greeting:
            return {"broken": str(greeting["failed"])}
        missing = greeting["missing"]
        if missing and not allow_weak:
            raise Failed("did not run")
        candidate.ask({"program": case["program"], "function": case["function"]})
        run_tests(case, candidate)
        reason = candidate.failure or ("" if candidate.calls else "the tests did not call the function")
    except Exception as error:
        reason = candidate.failure or _words(error)
    finally:
        status = zygote.end(candidate.channel)
    if missing is None:
        return {"broken": f"the inside did not answer: {reason}"}
    if candidate.failure == "the process ended" and os.WIFSIGNALED(status):
        reason += f" by {signal.Signals(os.WTERMSIG(status)).name}"
    return {"passed": not reason, "reason": reason, "missing": missing}


def run_tests(case: dict[str, str], candidate: Candidate) -> None:
    """The data set's own code: what precedes the function, then the tests."""
    namespace = {"__name__": "tests"}
    exec(compile(case["setup"], "setup.py", "exec"), namespace)
    namespace[case["function"]] = candidate
    exec(compile(case["tests"], "tests.py", "exec"), namespace)
    namespace["check"](candidate)


def _words(error: Exception) -> str:
    words = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
    return words.rstrip(": ")[:MAX_REASON_CHARACTERS] or "failed"
