"""A file for people that is written while its tensors are computed, so that the store's pack and the file are one.

Where an export takes what a formula makes, the formula's pack is laid out as that file: header, order, names and
what passes from elsewhere. Whoever exports tells by `FileLayout.key` that the pack is the file, byte for byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from sdforge.dtypes import ITEM_SIZE
from sdforge.formats.safetensors import header_bytes
from sdforge.ref import Ref

Shapes = dict[str, tuple[str, tuple[int, ...]]]
ALIGN = 64  # bytes: data of files for people begin at a multiple, so that two sums are made of them at once


def pays(made: int, whole: int) -> bool:
    """Say whether a pack is laid out as a file of which a formula makes `made` of `whole` bytes: a quarter or more.

    Otherwise the file is written beside the pack, `made` bytes a second time. While the file lies in `out/` a pack that
    is the file takes less of the disk, since both are one; without it, as much more as what lies elsewhere already.
    """
    return 4 * made >= whole


class Laid(NamedTuple):
    """A file that was written so: where it lies, its sha256, and the sha256 of the bytes after its header."""

    path: str
    sha256: str
    data_sha256: str


class FileLayout(NamedTuple):
    """What a file holds.

    shapes: its tensors → (dtype, shape); parts: its tensors → the tensors of components (`component.name`) whose bytes
    they are, one behind the other; odd: those that are not simply that, but transposed (true) or cut off at the end
    (false); passing: tensors of components that are copied from where they lie.
    """

    shapes: Shapes
    metadata: dict[str, str]
    parts: dict[str, list[str]]
    odd: dict[str, bool]
    passing: dict[str, Ref]

    def first(self) -> bytes:
        """Return the file's bytes up to its tensors."""
        return header_bytes(self.shapes, self.metadata, ALIGN)[0]

    def order(self) -> list[str]:
        """Return the file's tensors in the order of their bytes."""
        return header_bytes(self.shapes, self.metadata, ALIGN)[1]

    def size(self, name: str) -> int:
        """Return the bytes of one of the file's tensors."""
        dtype, shape = self.shapes[name]
        return prod(shape) * ITEM_SIZE[dtype]

    def spans(self) -> dict[str, int]:
        """Return what is written in one go, in the file's order → its bytes: tensors of components, or an odd one."""
        found: dict[str, int] = {}
        for name in self.order():
            parts = [name] if name in self.odd else self.parts.get(name, [])
            found |= dict.fromkeys(parts, self.size(name) // max(1, len(parts)))
        return found

    def key(self, fast: Mapping[str, str]) -> str:
        """Name the file's bytes by its header and the xxh3 of all tensors of components that it holds."""
        told = ",".join(fast[part] for name in self.order() for part in self.parts.get(name, []))
        return hashlib.sha256(self.first() + told.encode()).hexdigest()
