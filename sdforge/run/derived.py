"""Derived caches: latents, text encodings. Named by what they are made from, never pinned, made again when missing."""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Generic, TypeVar

import torch
import xxhash
from torch import Tensor

from sdforge.errors import UsageError
from sdforge.formats.safetensors import read_header, write_file
from sdforge.run.tensors import DTYPES, NAMES, raw
from sdforge.store.files import make_folder, own_name, publish

CHECK = "xxh3"  # metadata: of names and bytes
MOST = 1 << 30  # bytes of one kind that a training keeps in memory; what is more is read again when it is needed

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Derived:
    """A folder of small tensors; a damaged or missing one is made again.

    made, reused: what → how often. making: what surrounds the making, so that the networks that it takes are at hand.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder) if folder else None
        self.reused: Counter[str] = Counter()
        self.made: Counter[str] = Counter()
        self.making: Callable[[], AbstractContextManager[None]] = nullcontext

    def get(self, what: str, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors called `name` (64 hexadecimal digits), making and keeping them if need be; on the CPU."""
        path = self.folder / name[:2] / f"{name}.safetensors" if self.folder else None
        found = _read(path) if path else None
        if path and found is not None:
            with suppress(OSError):  # of a cache that another user shares, or that cannot be written to
                os.utime(path)  # it is used: `clean` removes what nobody has used for long
            self.reused[what] += 1
            return found
        self.made[what] += 1
        with self.making():
            made = make()
        tensors = {key: value.detach().cpu().contiguous() for key, value in made.items()}
        if path:
            make_folder(path.parent)
            self._keep(tensors, path)
        return tensors

    def _keep(self, tensors: dict[str, Tensor], path: Path) -> None:
        made = path.parent.parent / f".{own_name()}"
        shapes = {key: (NAMES[t.dtype], tuple(t.shape)) for key, t in tensors.items()}
        check = {CHECK: _checksum({key: raw(t) for key, t in tensors.items()})}
        try:
            write_file(made, shapes, lambda key: [raw(tensors[key])], check)
            publish(made, path)
        finally:
            made.unlink(missing_ok=True)


class Recent(Generic[Key, Value]):
    """What was had last of derived tensors, as much as there is room for; all of it where no folder keeps the rest."""

    def __init__(self, derived: Derived, size: Callable[[Value], int]) -> None:
        """size: bytes of a value."""
        self.bounded, self.size = derived.folder is not None, size
        self.bytes = 0
        self._kept: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, had: Callable[[], Value]) -> Value:
        """Return what is kept under a key, or has to be had anew."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        value = self._kept[key] = had()
        self.bytes += self.size(value)
        while self.bounded and self.bytes > MOST and len(self._kept) > 1:
            self.bytes -= self.size(self._kept.popitem(last=False)[1])
        return value


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        header, data = read_header(path), bytearray(path.read_bytes())
    except (OSError, UsageError):
        return None
    if header.metadata.get(CHECK) != _checksum(
        {n: data[e.offset : e.offset + e.size] for n, e in header.tensors.items()}
    ):
        return None
    return {
        name: torch.frombuffer(data, dtype=DTYPES[e.dtype], count=e.size // DTYPES[e.dtype].itemsize, offset=e.offset)
        .reshape(e.shape)
        .clone()
        for name, e in header.tensors.items()
    }


def _checksum(parts: Mapping[str, bytes | bytearray | memoryview]) -> str:
    fast = xxhash.xxh3_128()
    for name in sorted(parts):
        fast.update(name.encode())
        fast.update(parts[name])
    return fast.hexdigest()
