"""How a process shuts itself in: namespaces, a private file system, no privileges, limits, the filter of calls.

The zygote takes the first two steps once, before any candidate exists:

    unshare  =>  the worker maps user ids  =>  process 1 of the new namespace  =>  private file system

and each candidate, forked from it, the others before its first line runs:

    its own empty folder in memory  =>  another user  =>  no capabilities  =>  limits  =>  filter

There is one process and it can start no other, so the limits of one process on memory and processor time are totals,
and need no cgroup. What the system refuses is returned by name with the reason; without the filter nothing runs.
"""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from . import seccomp

# linux/sched.h
NEW_MOUNTS, NEW_CGROUP, NEW_UTS, NEW_IPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
NAMESPACES = NEW_MOUNTS | NEW_CGROUP | NEW_UTS | NEW_IPC | NEW_USER | NEW_PROCESSES | NEW_NETWORK
# sys/mount.h
READ_ONLY, NO_SET_USER_ID, NO_DEVICES, NO_PROGRAMS, REMOUNT, BIND = 1, 2, 4, 8, 32, 4096
RECURSIVE, PRIVATE, DETACH = 16384, 1 << 18, 2
# flags of statvfs, and the same of mount: what a remount has to keep
KEPT_FLAGS = {2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}  # asm/unistd_64.h, asm-generic/unistd.h
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38  # prctl.h
CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h
NOBODY = 65534
MAX_FILES_IN_FOLDER = 1024
WORK = "/candidate"

libc = ctypes.CDLL(None, use_errno=True)


def enter_namespaces(map_users: Callable[[], None]) -> dict[str, str]:
    """Leave the system's network, processes and files; returns as process 1 of its own world.

    Args:
        map_users: asks the worker, which is outside, to write this process's user ids; returns when that is done.

    Returns:
        What is missing and why.
    """
    if libc.unshare(NAMESPACES) == 0:
        map_users()
    elif libc.unshare(NAMESPACES & ~NEW_USER) != 0:  # root may, even where nobody gets a user namespace
        return dict.fromkeys(("network", "processes", "files"), f"unshare: {_reason()}")
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os._exit(0)
    try:
        build_file_system()
    except OSError as error:
        return {"files": str(error)}
    return {}


def build_file_system() -> None:
    """A root that holds the standard library, to be read, and an empty folder that each candidate covers with its own.

    Raises:
        OSError: a step was refused.
    """
    root = Path(__file__).resolve().parent  # any folder will do to build on, as the new tree covers it here only
    _mount("none", "/", None, RECURSIVE | PRIVATE)
    _mount("tmpfs", root, "tmpfs", NO_SET_USER_ID | NO_DEVICES, "size=1m,nr_inodes=128,mode=755")
    for library in filter(os.path.isdir, map(os.path.abspath, sys.path)):
        target = Path(f"{root}{library}")
        if target.exists():  # it lies in one that has been mounted
            continue
        target.mkdir(parents=True)
        _mount(library, target, None, BIND | RECURSIVE)
        for packages in ("site-packages", "dist-packages"):
            if (target / packages).is_dir():
                _mount("tmpfs", target / packages, "tmpfs", READ_ONLY, "size=4k,nr_inodes=1")
        _make_read_only(target)
    (root / WORK.strip("/")).mkdir()
    os.chdir(root)
    _check(libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _check(libc.umount2(b".", DETACH), "umount")
    os.chdir("/")
    _make_read_only(Path("/"))


def _make_read_only(path: Path) -> None:
    flags = os.statvfs(path).f_flag
    kept = sum(mount for flag, mount in KEPT_FLAGS.items() if flags & flag)
    _mount("none", path, None, REMOUNT | BIND | READ_ONLY | NO_SET_USER_ID | kept)


def shut_in(limits: dict[str, float], private_files: bool) -> dict[str, str]:
    """Give up everything that is left, for good.

    Args:
        limits: fields of `judge.Limits`.
        private_files: `build_file_system` has succeeded.

    Returns:
        What is missing and why.

    Raises:
        OSError: a step failed without which nothing may run.
    """
    missing = {}
    if private_files:
        _check(libc.unshare(NEW_MOUNTS), "unshare")
        options = f"size={limits['file_bytes']},nr_inodes={MAX_FILES_IN_FOLDER},mode=777"
        _mount("tmpfs", WORK, "tmpfs", NO_SET_USER_ID | NO_DEVICES | NO_PROGRAMS, options)
        os.chdir(WORK)
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError as error:
            missing["user"] = f"change of user: {error.strerror}"
    drop_capabilities()
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which would take it back
    for kind, value in (
        (resource.RLIMIT_CPU, int(limits["seconds"]) + 1),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        most = resource.getrlimit(kind)[1]
        value = int(value) if most == resource.RLIM_INFINITY else min(int(value), most)
        resource.setrlimit(kind, (value, value))
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    seccomp.install(private_files)
    return missing


def drop_capabilities() -> None:
    """No capability in any set of this process; with `no_new_privs` none comes back.

    Raises:
        OSError
    """
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    _check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def _mount(source: str | Path, target: str | Path, kind: str | None, flags: int, options: str = "") -> None:
    arguments = (os.fsencode(source), os.fsencode(target), kind and kind.encode(), ctypes.c_ulong(flags))
    _check(libc.mount(*arguments, options.encode() or None), f"mount {target}")


def _check(result: int, step: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{step}: {_reason()}")


def _reason() -> str:
    return os.strerror(ctypes.get_errno())
