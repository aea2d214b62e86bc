"""The inside: a warm interpreter that is forked for each candidate, and what the fork does.

The zygote shuts itself in, says what it could not get, and then does one thing over and over: fork a candidate when the
worker sends two pipes, and kill whatever is left of it when the worker says so. It never looks at what a candidate
does. The candidate gives up the rest, says so before the first line of foreign code runs, executes the program and
then answers calls of the function it defines, until it is killed. Nothing of it outlives it: its folder lies in memory
that goes with it, and it can start no other process.

Common modules are imported beforehand. This saves time; and where the system refuses a private file system, these are
the only ones a candidate can import, as it can open no file at all.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import types
from typing import Any

from . import confine
from .literals import Channel, NotLiteral, decode, encode

PRELOADED = (
    "abc array ast bisect calendar cmath collections collections.abc contextlib copy csv dataclasses datetime decimal "
    "difflib enum fractions functools hashlib heapq html io itertools json keyword locale math numbers operator "
    "pathlib pprint queue random re secrets statistics string struct textwrap time timeit traceback types typing "
    "unicodedata uuid warnings zlib"
)
MAX_REASON_CHARACTERS = 500


def main() -> None:
    """Argument: the limits as JSON. Standard input: the socket to the worker."""
    limits = json.loads(sys.argv[1])
    control = socket.socket(fileno=os.dup(0))
    os.dup2(1, 0)  # all three standard descriptors are the null device from here on
    os.environ.clear()
    for name in PRELOADED.split():
        importlib.import_module(name)
    missing = confine.enter_namespaces(lambda: _ask_for_mapping(control))
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(kind, signal.SIG_DFL)  # process 1 cannot be reached by signals that it does not handle
    gc.collect()
    gc.freeze()
    control.send(b"ready")
    serve(control, limits, missing)


def _ask_for_mapping(control: socket.socket) -> None:
    control.send(b"map")
    control.recv(16)


def serve(control: socket.socket, limits: dict[str, float], missing: dict[str, str]) -> None:
    """Fork, wait for the worker's word, kill; until the worker has gone."""
    while True:
        message, pipes, _, _ = socket.recv_fds(control, 16, 2)
        if not message:
            return
        child = os.fork()
        if not child:
            run_candidate(*pipes, limits, missing)
        for pipe in pipes:
            os.close(pipe)
        alive = control.recv(16)
        os.kill(child, signal.SIGKILL)
        if os.getpid() == 1:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # everything in this namespace but process 1
        _, status = os.waitpid(child, 0)
        if not alive:
            return
        control.send(str(status).encode())


def run_candidate(read_from: int, write_to: int, limits: dict[str, float], missing: dict[str, str]) -> None:
    """Never returns."""
    try:
        read_from, write_to = _keep_only(read_from, write_to)
        channel = Channel(read_from, write_to)
        try:
            missing = {**missing, **confine.shut_in(limits, "files" not in missing)}
        except OSError as error:
            channel.send({"failed": str(error)})
            return
        channel.send({"missing": missing})
        request = channel.receive()
        try:
            function = define(request["program"], request["function"])
        except BaseException as error:
            channel.send(describe(error))
            return
        channel.send({"value": None})
        while True:
            reply(channel, answer(function, channel.receive()))
    finally:
        os._exit(0)


def reply(channel: Channel, message: dict[str, Any]) -> None:
    try:
        channel.send(message)
    except NotLiteral as error:  # too long
        channel.send({"refused": str(error)})


def _keep_only(*pipes: int) -> tuple[int, ...]:
    """Close every descriptor but the standard ones and these, which become the next ones."""
    spare = [os.dup2(pipe, 100 + index, inheritable=False) for index, pipe in enumerate(pipes)]
    kept = tuple(os.dup2(pipe, 3 + index, inheritable=False) for index, pipe in enumerate(spare))
    os.closerange(3 + len(kept), 1024)
    return kept


def define(program: str, function: str) -> Any:
    """Execute a program as a module of its own and return the function that it defines."""
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module  # where dataclasses and pickling look their own classes up
    exec(compile(program, "candidate.py", "exec"), module.__dict__)
    if function not in module.__dict__:
        raise NameError(f"the program defines no {function}")
    return module.__dict__[function]


def answer(function: Any, call: dict[str, Any]) -> dict[str, Any]:
    try:
        result = function(*decode(call["positional"]), **decode(call["keywords"]))
    except BaseException as error:
        return describe(error)
    try:
        return {"value": encode(result)}
    except NotLiteral as error:
        return {"refused": str(error)[:MAX_REASON_CHARACTERS]}
    except BaseException as error:
        return describe(error)


def describe(error: BaseException) -> dict[str, Any]:
    """The class and the words of an exception, whatever its own methods do."""
    try:
        words = str(error)
    except BaseException:
        words = ""
    return {"raised": type(error).__name__[:MAX_REASON_CHARACTERS], "words": words[:MAX_REASON_CHARACTERS]}
