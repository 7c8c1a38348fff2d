"""SHA-256 of a file, and of what follows its first bytes: at once, where the compiled kernel and the processor can.

The two are of the same bytes, cut into the same blocks if what comes first is a multiple of 64. Then they share the
preparation of every block, and take three quarters of the time of one after the other.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any

from sdforge.kernel import kernel

BLOCK = 64  # bytes
# the first 32 bits of the fractions of the square roots of the first 8 primes (FIPS 180-4, §5.3.3)
BEGIN = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)


def sums_of(first: bytes, *, body: bool) -> Sums | SumsAtOnce:
    """Begin the sums of a file that begins so; body: whether what follows is summed by itself too."""
    if body and len(first) % BLOCK == 0 and (library := _library()) is not None:
        return SumsAtOnce(first, library)
    return Sums(first, body=body)


class Sums:
    """One sum after the other, or beside it."""

    def __init__(self, first: bytes, *, body: bool) -> None:
        self._sums = [hashlib.sha256(first), *([hashlib.sha256()] if body else [])]

    def tasks(self, data: memoryview) -> list[Callable[[], object]]:
        """Return what adds bytes: calls that may run side by side, each of them in the order of the data."""
        return [lambda each=each: each.update(data) for each in self._sums]  # type: ignore[misc]

    def digests(self) -> list[str]:
        """Return the sha256 of the file, and of what follows its first bytes where that was asked for."""
        return [each.hexdigest() for each in self._sums]


class SumsAtOnce:
    """Both sums by the compiled kernel."""

    def __init__(self, first: bytes, library: ctypes.CDLL) -> None:
        """first: whole blocks; library: the kernel."""
        self._library = library
        self._words = (ctypes.c_uint32 * 16)(*BEGIN, *BEGIN)
        self._first, self._size, self._rest = len(first), 0, b""
        self._add(self._words, 1, bytearray(first))

    def tasks(self, data: memoryview) -> list[Callable[[], object]]:
        """Return the one call that adds bytes, which lie in memory that could be written to."""
        return [lambda: self._update(data)]

    def _update(self, data: memoryview) -> None:
        self._size += len(data)
        if self._rest:
            missing = BLOCK - len(self._rest)
            self._rest += bytes(data[:missing])
            data = data[missing:]
            if len(self._rest) < BLOCK:
                return
            self._add(self._words, 2, bytearray(self._rest))
        whole = len(data) // BLOCK * BLOCK
        self._add(self._words, 2, data[:whole])
        self._rest = bytes(data[whole:])

    def digests(self) -> list[str]:
        """Return the sha256 of the file, and of what follows its first bytes."""
        return [self._digest(0, self._first + self._size), self._digest(1, self._size)]

    def _digest(self, number: int, size: int) -> str:
        """Return a sum of so many bytes: a bit, zeros, and their length in bits end it (§5.1.1)."""
        words = (ctypes.c_uint32 * 8)(*self._words[8 * number : 8 * number + 8])
        end = self._rest + b"\x80"
        end += bytes(-(len(end) + 8) % BLOCK) + (8 * size).to_bytes(8, "big")
        self._add(words, 1, bytearray(end))
        return b"".join(word.to_bytes(4, "big") for word in words).hex()

    def _add(self, words: Any, count: int, blocks: bytearray | memoryview) -> None:
        """Add whole blocks to so many sums, without the interpreter's lock."""
        memory = (ctypes.c_char * len(blocks)).from_buffer(blocks)
        self._library.add_to_sums(words, count, memory, ctypes.c_int64(len(blocks) // BLOCK))


@cache
def _library() -> ctypes.CDLL | None:
    """Return the kernel, where it and the processor can, and give hashlib's sums: that is tried once in a process."""
    library = kernel()
    return library if library is not None and library.sums_usable() and _agrees(library) else None


def _agrees(library: ctypes.CDLL) -> bool:
    data = bytes(range(256)) * 2
    first, plain = data[:BLOCK], Sums(data[:BLOCK], body=True)
    found = SumsAtOnce(first, library)
    for each in (plain, found):
        for task in each.tasks(memoryview(bytearray(data[BLOCK:]))[: -BLOCK // 2]):
            task()
    return found.digests() == plain.digests()
