"""Whether files lie in the page cache, and getting them into it or out of it."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

READ = 1 << 24  # bytes read at once


def fill(path: Path) -> None:
    """Read a file into the page cache, as far as there is room."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(READ)
        while file.readinto(buffer):
            pass


def drop(path: Path) -> None:
    """Take a file out of the page cache; what of it the disk does not have yet stays."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def resident(path: Path) -> float:
    """Return the share of a file's pages that lie in the page cache, 0 … 1. Raises OSError."""
    size = path.stat().st_size
    if not size:
        return 0.0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as mapped:
        pages = -(-size // mmap.PAGESIZE)
        flags = (ctypes.c_ubyte * pages)()
        start = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(ctypes.addressof(start), size, flags)
        del start  # a mapping that is pointed into cannot be closed
        if failed:
            raise OSError(ctypes.get_errno(), "mincore", str(path))
        return bytes(flags).count(1) / pages
