"""Attacks that the sandbox is tried with before every use: as data, so that tests and the self-test share them.

The program of an attack defines `attack`, which returns True if it got what it wanted. The tests demand that it does
not; then the case passes. An attack on the verdict itself is a wrong solution that must not pass (`passes=False`).
"""

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RIGHT = ("def add(a, b):\n    return a + b\n", "add", "def check(candidate):\n    assert candidate(2, 3) == 5\n")
# a module that is not loaded beforehand
RIGHT_WITH_LIBRARY = (f"import colorsys\n\n\n{RIGHT[0]}", *RIGHT[1:])
WITHSTOOD = """def check(candidate):
    try:
        result = candidate({arguments})
    except Exception:
        return
    assert result is not True, "the attack worked"
"""
WRONG = "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(7, 8) == 15\n"


@dataclass(frozen=True)
class Attack:
    """One attack as a case of the sandbox.

    Attributes:
        name: what it tries.
        program: defines `attack`.
        tests: defines `check`.
        passes: whether the case passes where the sandbox holds.
    """

    name: str
    program: str
    tests: str
    passes: bool


@dataclass(frozen=True)
class Places:
    """What lies outside to be attacked: a file, a Unix socket, a port on this machine, a process."""

    file: str
    unix_socket: str
    port: int
    process: int


@contextlib.contextmanager
def targets() -> Iterator[Places]:
    """A file and sockets that every user of this machine could reach."""
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-") as folder,
        socket.socket(socket.AF_UNIX) as local,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        os.chmod(folder, 0o777)
        file, path = Path(folder, "file.txt"), str(Path(folder, "socket"))
        file.write_text("secret")
        local.bind(path)
        local.listen()
        for each in (file, path):
            os.chmod(each, 0o666)
        yield Places(str(file), path, server.getsockname()[1], os.getpid())


# name: body of `attack(file, unix_socket, port, process)`
WANTED = {
    "read a file": "return bool(open(file).read())",
    "write a file": "open(file, 'a').write('x')\nreturn True",
    "make a file": "open(os.path.join(os.path.dirname(file), 'new'), 'w').close()\nreturn True",
    "stat a file": "os.stat(file)\nreturn True",
    "chmod a file": "os.chmod(file, 0o777)\nreturn True",
    "utime of a file": "os.utime(file, (0, 0))\nreturn True",
    "setxattr on a file": "os.setxattr(file, 'user.x', b'1')\nreturn True",
    "list the system": "return bool({'etc', 'proc', 'home'} & set(os.listdir('/')))",
    "connect to a Unix socket": "socket.socket(socket.AF_UNIX).connect(unix_socket)\nreturn True",
    "connect to a port": "socket.create_connection(('127.0.0.1', port), 1)\nreturn True",
    "open a raw socket": "return libc.socket(2, 3, 255) >= 0 or libc.socket(17, 3, 0) >= 0",
    "signal a process": "os.kill(process, 0)\nreturn True",
    "signal every process": "return libc.kill(-1, 0) == 0",
    "fork": "return os.fork() >= 0",
    "start a thread": "import _thread\n_thread.start_new_thread(print, ())\nreturn True",
    "start a program": "os.execv('/bin/sh', ['sh', '-c', 'true'])",
    "1.5 GiB of memory": "kept = [bytes(300 << 20) for _ in range(5)]\nreturn True",
    "1.5 GiB of shared memory": (
        "import mmap\n"
        "if all(libc.shmget(0, 256 << 20, 0o1600) >= 0 for _ in range(6)) or libc.memfd_create(b'x', 0) >= 0:\n"
        "    return True\n"
        "kept = [mmap.mmap(-1, 256 << 20) for _ in range(6)]\n"
        "return True"
    ),
    "100 MiB of disk": "for number in range(100):\n    open(str(number), 'wb').write(bytes(1 << 20))\nreturn True",
    "100,000 files": "for number in range(100_000):\n    open(str(number), 'w').close()\nreturn True",
    "1200 nested folders": "for _ in range(1200):\n    os.mkdir('d')\n    os.chdir('d')\nreturn True",
    "io_uring": "return libc.syscall(425, 4, ctypes.create_string_buffer(120)) >= 0",
    "keyctl": "return libc.syscall(219 if os.uname().machine == 'aarch64' else 250, 0, -3, 1) >= 0",
    "another namespace": "return libc.unshare(0x10000000) == 0",
    "mount": "return libc.mount(b'none', b'/', b'tmpfs', 0, None) == 0",
    "trace a process": "return libc.ptrace(16, process, 0, 0) == 0",
    "be root": "return os.setuid(0) is None",
    "read the environment": "return len(os.environ) > 0 or os.path.exists('/proc/self/environ')",
}
IMPORTS = "import ctypes\nimport os\nimport socket\n\nlibc = ctypes.CDLL(None, use_errno=True)\n"

# name: a wrong solution of addition
FORGED = {
    "exit early": "def attack(a, b):\n    import os\n    os._exit(0)\n",
    "raise SystemExit": "raise SystemExit(0)\n",
    "claim to have passed": (
        "import json, os\n"
        'body = json.dumps({"passed": True, "reason": "", "missing": {}, "value": True}).encode()\n'
        "for descriptor in range(64):\n"
        "    try: os.write(descriptor, (len(body).to_bytes(4, 'big') + body) * 9)\n"
        "    except OSError: pass\n"
        "os._exit(0)\n"
    ),
    "equal everything": (
        "class Equal(int):\n    __eq__ = __ne__ = __bool__ = lambda *_: True\n    __hash__ = int.__hash__\n\n\n"
        "def attack(a, b):\n    return Equal()\n"
    ),
    "no literal": "def attack(a, b):\n    return type('Any', (), {'__eq__': lambda *_: True})()\n",
    "a message without end": "import os\nwhile True:\n    os.write(4, b'\\xff' * 65536)\n",
    "a message nested deep": "import os\nos.write(4, (100_000).to_bytes(4, 'big') + b'[' * 100_000)\nos._exit(0)\n",
    "a pickle": (
        "import os, json\nbody = json.dumps({'value': {'pickle': 'cos\\nsystem\\n(S\"true\"\\ntR.'}}).encode()\n"
        "os.write(4, len(body).to_bytes(4, 'big') + body)\nos._exit(0)\n"
    ),
}


def all_attacks(places: Places) -> list[Attack]:
    """Every attack, on what `targets` has laid out."""
    arguments = f"{places.file!r}, {places.unix_socket!r}, {places.port}, {places.process}"
    found = []
    for name, body in WANTED.items():
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        program = f"{IMPORTS}\n\ndef attack(file, unix_socket, port, process):\n{lines}"
        found.append(Attack(name, program, WITHSTOOD.format(arguments=arguments), True))
    return found + [Attack(name, program, WRONG, False) for name, program in FORGED.items()]
