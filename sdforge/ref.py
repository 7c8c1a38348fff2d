"""A tensor where it lies: the bytes of a file from an offset on, verified whenever they are read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import xxhash

from sdforge.dtypes import ITEM_SIZE
from sdforge.errors import BrokenPromise, UsageError
from sdforge.formats.safetensors import fill, read_range
from sdforge.store.files import CHUNK, open_regular


class Ref(NamedTuple):
    """A tensor that is read: what it is, and in which file it lies from which byte on. xxh3 tells damage."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: str
    offset: int
    xxh3: str

    @property
    def size(self) -> int:
        return prod(self.shape) * ITEM_SIZE[self.dtype]

    def chunks(self) -> Iterator[bytes]:
        """Yield the tensor's bytes, verified at the end. Raises Damaged."""
        fast = xxhash.xxh3_128()
        try:
            fd = open_regular(Path(self.path))
        except UsageError:
            raise Damaged(self) from None
        try:
            for chunk in read_range(fd, self.offset, self.size):
                fast.update(chunk)
                yield chunk
        except UsageError:  # it ends too early
            raise Damaged(self) from None
        finally:
            os.close(fd)
        if fast.hexdigest() != self.xxh3:
            raise Damaged(self)

    def bytes(self) -> bytearray:
        """Return the tensor's bytes, verified. Raises Damaged."""
        data = bytearray(self.size)
        memory, fast = memoryview(data), xxhash.xxh3_128()
        fd = open_regular(Path(self.path))
        try:
            for start in range(0, self.size, CHUNK):
                part = memory[start : start + CHUNK]
                fill(fd, part, self.offset + start)
                fast.update(part)
        finally:
            os.close(fd)
        if fast.hexdigest() != self.xxh3:
            raise Damaged(self)
        return data


class Damaged(BrokenPromise):
    """Bytes that were read are not those that were planned with."""

    def __init__(self, ref: Ref) -> None:
        super().__init__(f"{ref.path} does not hold the {ref.name} that was planned with")
        self.ref, self.path = ref, ref.path

    def __reduce__(self) -> tuple[type[Damaged], tuple[Ref]]:
        return Damaged, (self.ref,)
