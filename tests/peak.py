"""What a piece of work holds in memory: `holds_less`, `peak`."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

MMAP_THRESHOLD = -3  # of glibc's `mallopt`: from how many bytes on memory is given back as soon as it is free
SMALL, USUAL = 1 << 18, 1 << 25  # the second is what it grows to by itself
TRIES = 3


def holds_less(work: Callable[[], object], most: int) -> bool:
    """Say whether some work holds less than so many bytes, done once or, if it seems to hold more, again.

    What earlier tests left in the heap is given back to the system between two tries, and libraries allocate much once.
    """
    return any(peak(work) < most for _ in range(TRIES))


def peak(work: Callable[[], object]) -> int:
    """Return by how many bytes this process's memory that belongs to no file grows at most.

    It may seem more where memory was free in the middle of the heap, but hardly less.
    """
    gc.collect()
    allocator = ctypes.CDLL(None)
    allocator.mallopt(MMAP_THRESHOLD, SMALL)  # holes between what is held would count otherwise
    try:
        allocator.malloc_trim(0)
        own, files = _held("RssAnon"), _of_files()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
        work()
        # of pages of files (libraries) some are read meanwhile, and some are taken away where others need memory
        return _held("VmHWM") - own - max(files, _of_files())
    finally:
        allocator.mallopt(MMAP_THRESHOLD, USUAL)


def _of_files() -> int:
    return _held("VmRSS") - _held("RssAnon")


def _held(field: str) -> int:
    """Return a figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024
