"""The inside of the sandbox: shuts itself in, runs `program.py` of its working folder, and then tells the token.

`code_sandbox.run_program` starts this file with `python -I`; it needs only the standard library. Its standard input is
a pipe with the token, which is read after the program has run; its standard output is the pipe back. The program
itself gets neither: it reads nothing, and what it prints goes to a file.

With namespaces there are three processes: this one, process 1 of the new namespace, and the program. When process 1
ends, the kernel kills whatever is left in its namespace, however it hid from its process group.
"""

import ctypes
import json
import os
import resource
import runpy
import sys

NOBODY = 65534
CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWPID, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x20000000, 0x08000000  # sched.h
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38  # prctl.h
SIGKILL = 9
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # the same on every architecture
# landlock.h: what may be done with files; REFER and TRUNCATE exist from the second and third version on.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REFER, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 13, 1 << 14
ALL_OF_VERSION_1 = (1 << 13) - 1
ONLY_FOR_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/dev/urandom")

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    settings = json.loads(sys.argv[1])
    token_pipe, report_pipe = os.dup(0), os.dup(1)
    redirect(settings["output"])
    isolation = become_nobody(settings["output"], settings["work"])
    isolation += enter_namespaces()
    set_limits(settings["limits"])
    isolation += hide_files(settings["work"])
    os.write(report_pipe, " ".join(isolation).encode() + b"\n")
    run("program.py", token_pipe, report_pipe)


def redirect(output: str) -> None:
    """Standard input is empty, standard output and error go to a file."""
    empty, printed = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(empty, 0)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.close(empty)
    os.close(printed)


def become_nobody(output: str, work: str) -> list[str]:
    """Give up being root, whom no limit on processes binds; not if only root can read the interpreter."""
    if os.geteuid() != 0:
        return ["user"]
    os.seteuid(NOBODY)
    readable = os.access(os.__file__, os.R_OK, effective_ids=True)
    os.seteuid(0)
    if not readable:
        return []
    for path in (os.path.dirname(work), work, os.path.join(work, "program.py"), output):
        os.chown(path, NOBODY, NOBODY)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    return ["user"]


def enter_namespaces() -> list[str]:
    """A world without network and without other processes, where the system lets an ordinary user have one."""
    if not hasattr(libc, "unshare") or libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC) != 0:
        return []
    for _ in range(2):  # this process -> process 1 of the namespace -> the program
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            os._exit(0)
        libc.prctl(PR_SET_PDEATHSIG, SIGKILL)
    return ["network", "processes"]


def set_limits(limits: dict[str, float]) -> None:
    seconds = int(limits["seconds"]) + 1
    for kind, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
    ):
        _, most = resource.getrlimit(kind)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))


def hide_files(work: str) -> list[str]:
    """Landlock: from here on only the interpreter's files can be read, and only the working folder written."""
    syscall = libc.syscall
    version = syscall(LANDLOCK_CREATE_RULESET, None, 0, 1) if sys.platform == "linux" else -1
    if version < 1:
        return []
    handled = ALL_OF_VERSION_1 | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    attributes = ctypes.c_uint64(handled)
    ruleset = syscall(LANDLOCK_CREATE_RULESET, ctypes.byref(attributes), ctypes.sizeof(attributes), 0)
    if ruleset < 0:
        return []
    read = EXECUTE | READ_FILE | READ_DIR
    readable = {*SYSTEM_FOLDERS, sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    rules = [(path, read) for path in readable] + [(work, handled), (os.devnull, READ_FILE | WRITE_FILE)]
    for path, access in rules:
        if os.path.exists(path):
            allow(ruleset, path, access & (handled if os.path.isdir(path) else ONLY_FOR_FILES))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    restricted = syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return ["files"] if restricted else []


class PathBeneath(ctypes.Structure):
    """struct landlock_path_beneath_attr of landlock.h"""

    _pack_ = 1
    _fields_ = [("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32)]


def allow(ruleset: int, path: str, access: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = PathBeneath(access, descriptor)
    libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, ctypes.byref(rule), 0)
    os.close(descriptor)


def run(file: str, token_pipe: int, report_pipe: int) -> None:
    """Execute the program as `__main__`; if it comes to its end, pass the token on and leave at once."""
    read, write, flush, leave = os.read, os.write, sys.stdout.flush, os._exit  # the program may replace the names
    runpy.run_path(file, run_name="__main__")
    write(report_pipe, read(token_pipe, 64))
    try:
        flush()
    finally:
        leave(0)


main()
