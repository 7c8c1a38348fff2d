"""Chosen system calls of a process, one after the other: let go on, made to fail, or the end of the process.

Linux's seccomp hands them to a listener (user notification, since 5.5), so that all others cost nothing; a debugger
would stop the process at every call. Calls of all its threads are counted in one row.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

# asm/unistd_64.h
NUMBERS = {
    "write": 1,
    "pwrite64": 18,
    "sendfile": 40,
    "fsync": 74,
    "fdatasync": 75,
    "ftruncate": 77,
    "rename": 82,
    "mkdir": 83,
    "rmdir": 84,
    "link": 86,
    "unlink": 87,
    "symlink": 88,
    "fchmod": 91,
    "fchown": 93,
    "openat": 257,
    "mkdirat": 258,
    "unlinkat": 263,
    "renameat": 264,
    "linkat": 265,
    "symlinkat": 266,
    "renameat2": 316,
    "copy_file_range": 326,
}
SECCOMP, PIDFD_GETFD = 317, 438
ARCHITECTURE = 0xC000003E  # linux/audit.h: AUDIT_ARCH_X86_64
SET_FILTER, NEW_LISTENER, NO_NEW_PRIVILEGES = 1, 8, 38  # linux/seccomp.h, linux/prctl.h
ALLOW, NOTIFY, GO_ON = 0x7FFF0000, 0x7FC00000, 1
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06  # linux/bpf_common.h
NUMBER_AT, ARCHITECTURE_AT, FLAGS_AT = 0, 4, 32  # in struct seccomp_data; the last: of the third argument
RECEIVE, ANSWER = 0xC0502100, 0xC0182101  # the listener's ioctls
CALL, REPLY = struct.Struct("<QIIi60x"), struct.Struct("<QqiI")  # seccomp_notif: id, process, flags, number; and _resp

Decide = Callable[[str, int], str]  # a call's name, and how manieth of its name: "", `kill`, or an error's name


@cache
def lacks() -> str:
    """Say why calls cannot be watched here; "" where they can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64" or not hasattr(os, "pidfd_open"):
        return "needs Linux on x86-64"
    return "" if _is_allowed() else "needs seccomp's listener and pidfd_getfd(2), which are not allowed here"


def _is_allowed() -> bool:
    """Try it on a process that makes a folder, and is not let."""
    with tempfile.TemporaryDirectory() as place:
        if (child := os.fork()) == 0:
            try:
                listen(["mkdir"], Path(place, "listener"))
                os.mkdir(f"{place}/folder")  # noqa: PTH102 -- the call itself
            finally:
                os._exit(0)
        try:
            return watch(child, Path(place, "listener"), lambda *_: "EIO")["mkdir"] == 1
        except OSError:
            os.kill(child, signal.SIGKILL)
            return False
        finally:
            os.waitpid(child, 0)


def listen(names: Iterable[str], told: Path) -> None:
    """Let nobody but `watch` decide on these calls of this process from now on. told: a file for it, with a descriptor.

    Of openat only those count that may make a file. Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    place = os.open(os.devnull, os.O_RDONLY)
    os.close(place)
    told.with_name("telling").write_text(str(place))  # the lowest free one, which the listener will be
    told.with_name("telling").rename(told)
    code = b"".join(struct.pack("<HBBI", *line) for line in _filter(NUMBERS[name] for name in names))
    lines = ctypes.create_string_buffer(code)
    program = struct.pack("<H6xQ", len(code) // 8, ctypes.addressof(lines))
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if libc.syscall(SECCOMP, SET_FILTER, NEW_LISTENER, program) != place:
        raise OSError(ctypes.get_errno(), "calls cannot be listened to")


def _filter(numbers: Iterable[int]) -> list[tuple[int, int, int, int]]:
    """Return a program for seccomp: (operation, steps if so, steps if not, value)."""
    lines = [(LOAD, 0, 0, ARCHITECTURE_AT), (EQUAL, 1, 0, ARCHITECTURE), (RETURN, 0, 0, ALLOW)]
    lines += [(LOAD, 0, 0, NUMBER_AT)]
    for number in numbers:
        if number == NUMBERS["openat"]:
            lines += [(EQUAL, 0, 4, number), (LOAD, 0, 0, FLAGS_AT), (ANY_BIT, 0, 1, os.O_CREAT)]
            lines += [(RETURN, 0, 0, NOTIFY), (RETURN, 0, 0, ALLOW)]
        else:
            lines += [(EQUAL, 0, 1, number), (RETURN, 0, 0, NOTIFY)]
    return [*lines, (RETURN, 0, 0, ALLOW)]


def watch(pid: int, told: Path, decide: Decide) -> Counter[str]:
    """Decide on the calls of a process that listens, until it ends; return how many of each name there were."""
    names = {number: name for name, number in NUMBERS.items()}
    counts: Counter[str] = Counter()
    process = os.pidfd_open(pid)
    listener = _taken(process, told)
    try:
        while process not in (ready := _ready(listener, process)):
            if listener not in ready:
                continue
            asked = bytearray(CALL.size)
            try:
                fcntl.ioctl(listener, RECEIVE, asked)
                which, _, _, number = CALL.unpack(asked)
                counts[names[number]] += 1
                wish = decide(names[number], counts[names[number]])
                if wish == "kill":
                    os.kill(pid, signal.SIGKILL)
                else:
                    answer = (0, 0, GO_ON) if not wish else (0, -getattr(errno, wish), 0)
                    fcntl.ioctl(listener, ANSWER, bytearray(REPLY.pack(which, *answer)))
            except FileNotFoundError:  # it has been killed meanwhile
                continue
    finally:
        os.close(listener)
        os.close(process)
    return counts


def _taken(process: int, told: Path) -> int:
    """Return the listener of a process, once it has one."""
    libc = ctypes.CDLL(None, use_errno=True)
    while not select.select([process], [], [], 0.001)[0]:
        if told.exists():
            found = libc.syscall(PIDFD_GETFD, process, int(told.read_text()), 0)
            if found >= 0 and str(Path(f"/proc/self/fd/{found}").readlink()) == "anon_inode:seccomp notify":
                return int(found)
            if found >= 0:
                os.close(found)
            elif ctypes.get_errno() != errno.EBADF:  # which it is before there is a listener
                raise OSError(ctypes.get_errno(), "the listener is not to be had")
    raise OSError(errno.ESRCH, "it ended before it listened")


def _ready(listener: int, process: int) -> set[int]:
    waiting = select.poll()
    waiting.register(listener, select.POLLIN)
    waiting.register(process, select.POLLIN)
    return {fd for fd, event in waiting.poll() if event & select.POLLIN}
