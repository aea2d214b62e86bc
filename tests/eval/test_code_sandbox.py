"""The sandbox: what a program cannot do, and that nothing but running to the end passes."""

import os
import socket
import threading
import time

import pytest

from modeling_nanochat.eval.sandbox.outside import Limits, run_program
from modeling_nanochat.eval.tasks import humaneval

LIMITS = Limits(seconds=20)  # generous: the machine may be busy


@pytest.fixture(scope="module")
def isolation():
    result = run_program("print('here')", LIMITS)
    assert result.passed and result.output == "here\n"
    return result.isolation


def test_a_good_program_passes_and_a_failing_one_does_not():
    good = "import json, math, collections\nopen('own.txt', 'w').write('x')\nassert open('own.txt').read() == 'x'"
    assert run_program(good, LIMITS).passed
    result = run_program("assert 1 == 2, 'no'", LIMITS)
    assert not result.passed and not result.timed_out and "AssertionError: no" in result.output
    assert not run_program("this is no Python", LIMITS).passed
    assert not run_program("\ud800\x00", LIMITS).passed


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os; os.abort()",
        "print('passed'); quit()",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'passed')\n    except OSError: pass\nos._exit(0)",
        "import sys; sys.stdout = sys.stderr = None; raise SystemExit",
    ],
)
def test_leaving_early_does_not_pass(program):
    assert not run_program(program + "\nassert False", LIMITS).passed


def test_a_program_cannot_replace_what_reports_for_it():
    program = "import os, sys, builtins\nos.write = os.read = os._exit = builtins.open = None\nsys.modules.clear()"
    assert run_program(program, LIMITS).passed  # it did run to its end
    assert not run_program(program + "\nraise ValueError", LIMITS).passed


def test_time_is_limited_and_everything_is_killed(isolation):
    program = (
        "import os, time\nfor _ in range(3):\n"
        "    if os.fork() == 0:\n        os.setsid()\n        while True: time.sleep(1)\n"
        "while True: pass"
    )
    started = time.monotonic()
    result = run_program(program, Limits(seconds=1.5))
    assert result.timed_out and not result.passed and time.monotonic() - started < 10
    result = run_program(program.replace("while True: pass", "print('ended')"), LIMITS)
    assert result.passed
    deadline = time.monotonic() + 10
    while "processes" in isolation and survivors():
        assert time.monotonic() < deadline, survivors()
        time.sleep(0.05)


def survivors() -> list[str]:
    """Command lines of processes of the sandbox that are still alive."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                command = file.read()
            with open(f"/proc/{entry}/status") as file:
                parent = next(line.split()[1] for line in file if line.startswith("PPid"))
        except OSError:
            continue
        if b"sandbox/inside.py" in command and parent in ("1", str(os.getpid())):
            found.append(command.decode())
    return found


def test_memory_files_and_descriptors_are_limited():
    assert "MemoryError" in run_program("x = bytearray(3 << 30)", LIMITS).output
    big = "with open('big', 'wb') as file:\n    for _ in range(100): file.write(bytes(1 << 20))"
    assert "File too large" in run_program(big, LIMITS).output
    many = "files = [open('/dev/null') for _ in range(200)]"
    assert "Too many open files" in run_program(many, LIMITS).output
    printing = run_program("while True: print('x' * 10000)", LIMITS)
    assert not printing.passed and len(printing.output) <= 4000


def test_processes_are_limited(isolation):
    if "user" not in isolation:
        return  # root, with an interpreter that nobody else may read: the result says that this limit is missing
    program = "import os, time\nfor _ in range(60):\n    if os.fork() == 0:\n        time.sleep(60)"
    assert "BlockingIOError" in run_program(program, LIMITS).output


def test_environment_and_input_are_empty(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "12345")
    program = "import os, sys\nassert 'SECRET_TOKEN' not in os.environ\nassert sys.stdin.read() == ''\nprint(sys.argv)"
    result = run_program(program, LIMITS)
    assert result.passed, result.output
    assert "12345" not in result.output


def test_there_is_no_network(isolation):
    server = socket.create_server(("127.0.0.1", 0))
    accepted = threading.Event()
    threading.Thread(target=lambda: (server.accept(), accepted.set()), daemon=True).start()
    program = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
    result = run_program(program, LIMITS)
    if "network" in isolation:
        assert not result.passed and "unreachable" in result.output and not accepted.is_set()


def test_other_files_and_processes_are_out_of_reach(isolation, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    tmp_path.chmod(0o755)
    attempts = {
        f"print(open({str(secret)!r}).read())": "files",
        f"open({str(tmp_path / 'new.txt')!r}, 'w').write('x')": "files",
        "import os; print(os.listdir('/'), os.listdir('/etc'))": "files",
        f"import os; os.kill({os.getpid()}, 0)": "processes",
    }
    for program, part in attempts.items():
        if part in isolation:
            result = run_program(program, LIMITS)
            assert not result.passed and "the secret" not in result.output
    assert os.listdir(tmp_path) == ["secret.txt"]


def test_isolation_is_named(isolation):
    assert set(isolation) <= {"user", "network", "processes", "files"}


def test_human_eval_is_judged():
    row = {
        "prompt": 'def add(a: int, b: int) -> int:\n    """The sum."""\n',
        "canonical_solution": "    return a + b\n",
        "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n",
        "entry_point": "add",
    }
    assert run_program(humaneval.program(row, row["canonical_solution"]), LIMITS).passed
    assert not run_program(humaneval.program(row, "    return a - b\n"), LIMITS).passed
    assert not run_program(humaneval.program(row, "    import os; os._exit(0)\n"), LIMITS).passed
