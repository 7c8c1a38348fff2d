"""Packs of which most is needed by nobody any more: what is needed moves into a new one.

A result stays what it is, under its key and digest; its tables say where the bytes lie now. New packs are there before
anything names them, and old ones go when nothing does any more: whenever this ends, every result has its bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import NamedTuple

from sdforge.artifact import Component, Spot, Tensor
from sdforge.dtypes import ITEM_SIZE
from sdforge.errors import BrokenPromise
from sdforge.formats.safetensors import header_bytes, write_file
from sdforge.ref import Damaged, Ref
from sdforge.store import Store
from sdforge.store.entries import Result, table_bytes

NOT_YET = "0" * 64  # in the place of a sha256 that is not known before a pack is written

Span = tuple[int, int]  # where a tensor begins in a file, and its bytes


class Pack(NamedTuple):
    """A pack of the store: its sha256, where it lies, its size in bytes, and the tensors in it that are needed."""

    sha256: str
    path: Path
    size: int
    needed: dict[Span, Tensor]

    def named(self) -> dict[str, Tensor]:
        """Return name in the new pack → tensor; what is the same lies there once."""
        return {tensor.content: tensor for tensor in self.needed.values()}

    def laid_out(self) -> tuple[int, dict[str, int]]:
        """Return the new pack's size, and where each tensor begins in it."""
        shapes = _shapes(self.named())
        first, order = header_bytes(shapes, {})
        place, offsets = len(first), {}
        for name in order:
            dtype, shape = shapes[name]
            offsets[name] = place
            place += prod(shape) * ITEM_SIZE[dtype]
        return place, offsets

    def moves(self, sha256: str) -> dict[Span, Spot]:
        """Return where everything lies in the new pack, which has this sha256."""
        offsets = self.laid_out()[1]
        return {span: Spot(sha256, offsets[tensor.content]) for span, tensor in self.needed.items()}

    def write(self, path: Path) -> str:
        """Write the new pack; return its sha256. Raises Damaged for bytes that are not what they were."""
        named = self.named()

        def content(name: str) -> Iterator[bytes]:
            tensor = named[name]
            assert tensor.spot is not None
            return Ref(name, tensor.dtype, tensor.shape, str(self.path), tensor.spot.offset, tensor.xxh3).chunks()

        return write_file(path, _shapes(named), content).sha256


Moves = dict[str, dict[Span, Spot]]  # of packs, by their sha256


def needed_tensors(store: Store, results: Iterable[Result]) -> dict[str, dict[Span, Tensor]]:
    """Return the files (by sha256) in which tensors lie that these results list → those tensors."""
    found: dict[str, dict[Span, Tensor]] = {}
    for component in _tables(results).values():
        for tensor in _rows(store, component):
            if tensor.spot:
                found.setdefault(tensor.spot.file, {})[tensor.spot.offset, tensor.size] = tensor
    return found


def unneeded(pack: Pack) -> int:
    """Return the bytes of a pack's tensors that nobody needs."""
    with pack.path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    return pack.size - header - sum(size for _, size in pack.needed)


def packs_of(store: Store, results: list[Result]) -> list[Pack]:
    """Return the packs in which tensors of these results lie.

    A pack that is a file of an export too, byte for byte, is left out: what passes lies there for the file. So are
    sources that were converted: their tables say where everything lies in them.
    """
    others = {row[0] for result in results for row in result.files.values()} | store.source_tables()
    found = []
    for sha256, needed in sorted(needed_tensors(store, results).items()):
        path = store.object(sha256)
        if path.is_file() and sha256 not in others:  # other places are sources
            found.append(Pack(sha256, path, path.stat().st_size, needed))
    return found


def worn_packs(store: Store, results: list[Result]) -> list[Pack]:
    """Return the packs of which less than half is needed by these results."""
    return [pack for pack in packs_of(store, results) if 2 * unneeded(pack) > pack.size]


def saved(store: Store, results: list[Result], packs: list[Pack]) -> int:
    """Return the bytes by which these packs, and the tables that list them, are larger than the new ones."""
    moves = {pack.sha256: pack.moves(NOT_YET) for pack in packs}
    found = sum(pack.size - pack.laid_out()[0] for pack in packs)
    for component in _tables(results).values() if moves else ():
        rows = _rows(store, component)
        moved = _moved(rows, moves)
        found += len(table_bytes(rows)) - len(table_bytes(moved)) if moved != rows else 0
    return found


def repack(store: Store, results: list[Result], packs: list[Pack]) -> list[Pack]:
    """Write packs anew, and let the results lie there; return those that went. A damaged one stays for `verify`."""
    gone, moves = [], {}
    work = store.workplace()
    try:
        for pack in packs:
            try:
                sha256 = pack.write(work / "pack")
            except Damaged:
                continue
            store.put_file(work / "pack", sha256)
            moves[pack.sha256] = pack.moves(sha256)
            gone.append(pack)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    old = [table for result in results for table in _move(store, result, moves)]
    for path in [pack.path for pack in gone] + [store.object(table) for table in old]:
        path.unlink(missing_ok=True)
    return gone


def _move(store: Store, result: Result, moves: Moves) -> list[str]:
    """Let a result lie in the new packs; return its tables that nobody needs any more."""
    components, old = dict(result.components), []
    for name, component in result.components.items():
        rows = _rows(store, component)
        moved = _moved(rows, moves)
        if moved != rows:
            components[name] = component._replace(table=store.put_table(moved))
            old.append(component.table)
    if old:
        packs = {t.spot.file for c in components.values() for t in _rows(store, c) if t.spot}
        store.rewrite(replace(result, components=components, packs=tuple(sorted(packs))))
    return old


def _moved(rows: list[Tensor], moves: Moves) -> list[Tensor]:
    def spot(tensor: Tensor) -> Spot | None:
        within = moves.get(tensor.spot.file) if tensor.spot else None
        return within[tensor.spot.offset, tensor.size] if within and tensor.spot else tensor.spot

    return [tensor._replace(spot=spot(tensor)) for tensor in rows]


def _tables(results: Iterable[Result]) -> dict[str, Component]:
    """Return the tables of these results, each once, by a component that has it."""
    return {component.table: component for result in results for component in result.components.values()}


def _rows(store: Store, component: Component) -> list[Tensor]:
    """Return the tensors of a component: none of a vocabulary, nor of a table that is lost or damaged."""
    if not component.dtype:
        return []
    try:
        return store.table(component)
    except BrokenPromise:
        return []


def _shapes(named: dict[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in named.items()}
