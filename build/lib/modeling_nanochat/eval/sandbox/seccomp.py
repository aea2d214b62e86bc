"""The filter of system calls: what a candidate may ask of the kernel, by an allow-list of harmless calls.

Everything else fails with "Operation not permitted": processes and threads, programs, sockets, signals to others,
permissions and attributes of files, shared memory, keys, io_uring, namespaces, and whatever the kernel learns next.
The calls that name files are allowed only where a private file system leaves nothing outside to be named.

The filter is assembled here, 20 lines of classic BPF. The alternative, pyseccomp (last released in 2021), needs
libseccomp on the system and site-packages on the inside. The price is the table of numbers below; a test compares it
with libseccomp's where that is installed.
"""

import ctypes
import errno
import os
import platform
import struct

# name: (number on x86_64, number on aarch64), of asm/unistd_64.h and asm-generic/unistd.h; None: does not exist there
CALLS = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "futex": (202, 98), "restart_syscall": (219, 128), "sched_yield": (24, 124),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "getrandom": (318, 278),
    "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "sched_getaffinity": (204, 123), "uname": (63, 160),
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
FILE_CALLS = {
    "open": (2, None), "openat": (257, 56), "stat": (4, None), "lstat": (6, None), "newfstatat": (262, 79),
    "statx": (332, 291), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "truncate": (76, 45), "ftruncate": (77, 46),
}  # fmt: skip
# name of the machine: (column above, AUDIT_ARCH_* of linux/audit.h)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2  # prctl.h, seccomp.h
KILL_PROCESS, ALLOW, NOT_PERMITTED = 0x80000000, 0x7FFF0000, 0x00050000 | errno.EPERM  # SECCOMP_RET_* of seccomp.h
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K of linux/bpf_common.h
NUMBER, ARCHITECTURE = 0, 4  # offsets in struct seccomp_data


def supported() -> bool:
    return platform.system() == "Linux" and platform.machine() in MACHINES


def assemble(files: bool) -> bytes:
    """The program: another architecture's calls kill, those listed pass, all others are not permitted.

    Args:
        files: allow the calls that name files.
    """
    column, architecture = MACHINES[platform.machine()]
    calls = {**CALLS, **FILE_CALLS} if files else CALLS
    lines = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_IF_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, NUMBER),
    ]
    for numbers in calls.values():
        if numbers[column] is not None:
            lines += [(JUMP_IF_EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, ALLOW)]
    lines.append((RETURN, 0, 0, NOT_PERMITTED))
    return b"".join(struct.pack("HBBI", *line) for line in lines)


class Program(ctypes.Structure):
    """struct sock_fprog of linux/filter.h"""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def install(files: bool) -> None:
    """Filter this process from here on; `PR_SET_NO_NEW_PRIVS` has been set.

    Raises:
        OSError: the kernel takes no filter.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    program = assemble(files)
    argument = Program(len(program) // 8, program)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(argument), 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")
