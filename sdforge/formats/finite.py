"""NaN and Inf in the bytes of a file while they are read anyway, without a library of numbers.

A number of IEEE 754 (and of bf16, fp8) is one where all bits of its exponent are set. Most of them stand in its last
byte of the little-endian order; of the wider types that byte alone makes a number suspect, and the one before decides.
"""

from __future__ import annotations

import re

from sdforge.dtypes import ITEM_SIZE


def _bytes_with(mask: int) -> list[bytes]:
    return [bytes([value]) for value in range(256) if value & mask == mask]


LAST = {
    "F8_E4M3": _bytes_with(0x7F),  # it has no Inf, and one NaN
    "F8_E5M2": _bytes_with(0x7C),
    "F16": _bytes_with(0x7C),
    **dict.fromkeys(("BF16", "F32", "F64"), _bytes_with(0x7F)),
}
BEFORE = {"BF16": 0x80, "F32": 0x80, "F64": 0xF0}  # bits that are set in the byte before
SUSPECT = re.compile(b"[\x7f\xff]")


class Finite:
    """Looks at a tensor's bytes as they come, in chunks of any length. `broken`: whether there was a NaN or an Inf."""

    def __init__(self, dtype: str) -> None:
        self.dtype, self.size = dtype, ITEM_SIZE[dtype]
        self.broken = False
        self.rest = b""  # of a number that goes on in the next chunk

    def update(self, chunk: bytes) -> None:
        """Take the next bytes."""
        if self.dtype not in LAST or self.broken:
            return
        data = self.rest + chunk if self.rest else chunk
        whole = len(data) - len(data) % self.size
        self.rest = data[whole:]
        last = data[self.size - 1 : whole : self.size]
        self.broken = any(value in last for value in LAST[self.dtype]) and self._decided(data[:whole], last)

    def _decided(self, data: bytes, last: bytes) -> bool:
        if self.dtype not in BEFORE:
            return True
        mask, before = BEFORE[self.dtype], data[self.size - 2 :: self.size]
        return any(before[found.start()] & mask == mask for found in SUSPECT.finditer(last))
