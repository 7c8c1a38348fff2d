"""A large file that is written from front to back, past the page cache, and named while it is written.

What is copied into the page cache is copied once more on its way to the disk, and pushes the inputs out that are
still to be read. Where a system or a disk cannot do without it, it is used, and the disk is asked to begin early.
The memory that a file passes through is shared with processes that are forked: they put their bytes where the file
will have them, so that nobody copies them from hand to hand.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sdforge.kernel.sums import sums_of

BUFFER = 4 << 20  # bytes that are written at once
BUFFERS = 3  # one is filled, while the others are written and hashed; more of them, where others fill some ahead
SMALL = 16 << 20  # bytes of a file up to which threads are not worth it
BLOCK = 4096  # bytes, of which what is written past the cache is a multiple
FLUSHED = 1 << 28  # bytes after which the disk is asked to write what the cache holds
DIRECT = getattr(os, "O_DIRECT", 0)


class Window:
    """The memory that a file passes through: buffers, each of which holds the next part once its last one is written.

    Forked processes see the same memory.
    """

    def __init__(self, buffer: int, count: int) -> None:
        """buffer: bytes of one; count: how many there are."""
        self.buffer, self.count = buffer, count
        self.memory = mmap.mmap(-1, buffer * count)

    def number(self, place: int) -> int:
        """Return the number of the part of the file in which a place of the file lies."""
        return place // self.buffer

    def part(self, place: int, size: int) -> memoryview:
        """Return the memory of so many bytes from a place of the file on, or of fewer: up to the end of its part."""
        number, start = divmod(place, self.buffer)
        begin = number % self.count * self.buffer + start
        return memoryview(self.memory)[begin : begin + min(size, self.buffer - start)]


class Poured:
    """The file: `close` writes what is left of it and tells its sha256; leaving it as a context lets go of it.

    It is flushed by whoever publishes it.
    window: what it passes through; freed: how many parts of the file have left it, so that others may have their place.
    """

    def __init__(self, path: Path, first: bytes, size: int, *, body: bool, ahead: int = 0) -> None:
        """first: how it begins; size: of the file in bytes; body: whether what follows is hashed by itself too.

        ahead: buffers of a large file that others may fill before it is their turn.
        """
        self.size, self.place, self.filled = size, 0, 0  # bytes that were given to be written, and of the next part
        self.threads = [ThreadPoolExecutor(1) for _ in range(4)] if size > SMALL else []
        self.fd, self.direct = _opened(path, direct=size > SMALL)
        most = BUFFER if size > SMALL else max(1, min(size, BUFFER))
        self.window, self.freed = Window(most, BUFFERS + ahead if self.threads else 1), 0
        self.busy: deque[list[Future[None]]] = deque()
        self.flushes: list[Future[None]] = []
        self.sums, self.skipped = sums_of(first, body=body), len(first)
        self.unflushed = 0  # bytes
        self.write(first)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write what comes next; the memory is the caller's again afterwards."""
        memory = memoryview(data).cast("B")
        while memory:
            place = self.window.part(self.told(), len(memory))
            place[:] = memory[: len(place)]
            self.grew(len(place))
            memory = memory[len(place) :]

    def grew(self, size: int) -> None:
        """Write what comes next, of which so many bytes lie in the window."""
        while size:
            more = min(size, self.window.buffer - self.filled)
            self.filled += more
            size -= more
            if self.filled == self.window.buffer:
                self._hand_over()

    def told(self) -> int:
        """Return how many bytes have been given so far."""
        return self.place + self.filled

    def _hand_over(self) -> None:
        """Have a part written and hashed, and go on with the next one as soon as there is room for it."""
        memory = self.window.part(self.place, self.filled)
        tasks: list[Callable[[], object]] = [
            partial(self._pour, memory, self.place),
            *self.sums.tasks(memory[max(0, self.skipped - self.place) :]),
        ]
        self.place += self.filled
        self.unflushed += self.filled
        self.filled = 0
        if not self.threads:
            for task in tasks:
                task()
            self.freed += 1
            return
        done: list[Future[Any]] = [thread.submit(task) for thread, task in zip(self.threads, tasks, strict=False)]
        self.busy.append(done)
        if not self.direct and self.unflushed > FLUSHED:
            self.unflushed = 0
            self.flushes.append(self.threads[-1].submit(os.fdatasync, self.fd))
        while len(self.busy) >= BUFFERS or (self.busy and all(each.done() for each in self.busy[0])):
            self._wait()

    def _wait(self) -> None:
        """Wait for the part that was handed over first. Raises what its disk said."""
        for each in self.busy.popleft():
            each.result()
        self.freed += 1

    def _pour(self, memory: memoryview, place: int) -> None:
        if self.direct and len(memory) % BLOCK:  # the end of the file: what is too much is cut off
            memory = self.window.part(place, -(-len(memory) // BLOCK) * BLOCK)
        while memory:
            try:
                count = os.pwrite(self.fd, memory, place)
            except OSError as error:
                if error.errno != errno.EINVAL or not self.direct:
                    raise
                self._through_cache()
                continue
            memory, place = memory[count:], place + count
            if self.direct and count % BLOCK:  # a full disk may take less than a block
                self._through_cache()

    def _through_cache(self) -> None:
        """Go on with the page cache: this file system has no other way."""
        import fcntl

        fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~DIRECT)
        self.direct = False

    def close(self) -> None:
        """Write what is left. Raises ValueError for a file of another size than was said, and what the disk said."""
        self._hand_over()
        while self.busy:
            self._wait()
        for each in self.flushes:
            each.result()
        if self.place != self.size:
            raise ValueError(f"{self.place} bytes were given for a file of {self.size}")
        os.ftruncate(self.fd, self.size)

    @property
    def sha256(self) -> str:
        """The sha256 of the file."""
        return self.sums.digests()[0]

    @property
    def body_sha256(self) -> str:
        """The sha256 of what follows its first bytes; only where it was asked for."""
        return self.sums.digests()[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for thread in self.threads:
            thread.shutdown(cancel_futures=True)
        os.close(self.fd)


def _opened(path: Path, *, direct: bool) -> tuple[int, bool]:
    """Open a file that is made anew; say whether what is written goes past the page cache."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    if direct and DIRECT:
        try:
            return os.open(path, flags | DIRECT, 0o644), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, flags, 0o644), False
