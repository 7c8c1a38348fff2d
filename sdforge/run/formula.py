"""Formulas: tensors through a merge or an edit, rounded once, into a pack.

Elementwise arithmetic is fp32 for inputs of at most 16 bits and fp64 otherwise; either gives the same bytes on every
machine, since `+ − × ÷ sqrt` are separate operations.
What is made element by element, or row by row, is read and computed in parts that stay in the caches, by two processes,
while this one writes and hashes the file in its order; only what needs a whole tensor holds one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import cache, partial
from math import prod
from operator import is_
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Self

import torch
import xxhash
from torch import Tensor

from sdforge.dtypes import ITEM_SIZE
from sdforge.errors import GET_AGAIN, ActionFailed
from sdforge.file_layout import FileLayout, Shapes
from sdforge.formats.layout import transposed
from sdforge.formats.safetensors import fill
from sdforge.method import method_groups, module_of
from sdforge.order import Computation, Order, Outcome
from sdforge.ref import Damaged, Ref
from sdforge.run.fused import CannotBeNoted, Factors, Fused, Noted, Notes, without
from sdforge.run.side_by_side import Stream, drained, in_order
from sdforge.run.tensors import DTYPES, PART, UNBOUND, Digests, Pack, finite, hashed, load, raw, rounded
from sdforge.selection import LARGE, selecting_on
from sdforge.store.files import open_regular

Report = Callable[..., None]
Apart = dict[str, tuple[Digests, bytes]]  # what a file holds otherwise than it is
Written = tuple[Digests | None, Apart]
Job = Callable[[], Stream[Written]]
Selecting = Callable[[], AbstractContextManager[None]]  # what is selected within is selected by a device
PROCESSES = 2  # one computes while the other waits for memory or disk; each may hold a tensor that is needed whole
SMALL = 16 << 20  # bytes that one process has written before others have begun
AHEAD = 6  # buffers of the file that they may fill before it is their turn
LITTLE = 8  # times that a result has the elements of an input, which is then read and widened before its first part
ONE_PASS = 1 << 18  # elements made at a time by the kernel, which leaves nothing in the caches between two operations


def run_formula(order: Order, report: Report) -> Outcome:
    """Compute the tensors of an order and write them into one pack, which may be laid out as a file for people."""
    rows = {f"{c.component}.{c.name}": c for c in order.compute}
    shapes: Shapes = {name: (c.dtype, c.shape) for name, c in rows.items()}
    others: Apart = {}
    without()  # the processes that are forked have it from here
    ahead = AHEAD if _processors() > 1 else 0
    with Pack(Path(order.work) / "pack.safetensors", shapes, order.layout, ahead=ahead) as pack, _one_thread():
        jobs = _jobs(order.layout, pack, rows)
        on_device = partial(selecting_on, order.how.get("device", "cpu"), cache(lambda why: report(remark=why)))
        with closing(_done(jobs, pack, rows, on_device)) as done:  # whatever happens here, no process is left behind
            for number, (name, (digests, apart)) in enumerate(done, 1):
                pack.wrote(name, digests)
                others |= apart
                report(step=number, steps=len(jobs))
        return _outcome(order, pack, others)


def _jobs(layout: FileLayout | None, pack: Pack, rows: dict[str, Computation]) -> dict[str, Job]:
    """Return what is written in one go → how it is made, in the order of the pack."""

    def made(name: str) -> Stream[Written]:
        digests = yield from hashed(results(rows[name], name))
        return digests, {}

    def passing(name: str) -> Stream[Written]:
        assert layout is not None
        yield from layout.passing[name].chunks()
        return None, {}

    def odd(name: str) -> Stream[Written]:
        assert layout is not None
        apart: Apart = {}
        data = b"".join(whole(part, apart) for part in layout.parts[name])
        dtype, shape = layout.shapes[name]
        yield transposed(data, shape[0], ITEM_SIZE[dtype]) if layout.odd[name] else data[: layout.size(name)]
        return None, apart

    def whole(part: str, apart: Apart) -> bytes | bytearray:
        assert layout is not None
        if part in layout.passing:
            return layout.passing[part].bytes()
        found: list[bytes] = []
        digests = drained(hashed(results(rows[part], part)), lambda piece: found.append(bytes(piece)))
        data = b"".join(found)
        apart[part] = digests, data
        return data

    strange = layout.odd if layout else {}
    return {name: partial(odd if name in strange else made if name in rows else passing, name) for name in pack.sizes}


def _outcome(order: Order, pack: Pack, others: Apart) -> Outcome:
    """Return what was written, and of a pack that is laid out as a file by what it is known to be that.

    What a file holds otherwise than it is (transposed or cut off) is written into a pack of its own.
    """
    names: dict[str, list[str]] = {}
    elsewhere: dict[str, list[str]] = {}
    for c in order.compute:
        lies_apart = f"{c.component}.{c.name}" in others
        (elsewhere if lies_apart else names).setdefault(c.component, []).append(c.name)
    outcome = pack.outcome(names)
    fast = {name: digests.xxh3 for name, digests in pack.digests.items()}
    if others:
        shapes = {name: pack.shapes[name] for name in others}
        with Pack(Path(order.work) / "apart.safetensors", shapes) as apart:
            for name in apart.sizes:
                digests, data = others[name]
                apart.file.write(data)
                apart.wrote(name, digests)
            other = apart.outcome(elsewhere)
        outcome.apart = [other.pack, other.sha256]
        fast |= {name: digests.xxh3 for name, (digests, _) in others.items()}
        for component, found in other.components.items():
            outcome.components.setdefault(component, []).extend([*row, True] for row in found)
    if order.layout is not None:
        fast |= {name: ref.xxh3 for name, ref in order.layout.passing.items()}
        outcome.laid = [order.layout.key(fast), pack.file.body_sha256]
    return outcome


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread, as each of several processes does; whoever computes next here has its own number."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)


def _done(
    jobs: dict[str, Job], pack: Pack, rows: dict[str, Computation], on_device: Selecting
) -> Generator[tuple[str, Written]]:
    """Do all jobs, and yield the name of each with what it wrote.

    Processes make what can be made in parts, or is small; this one hashes and writes, and makes what is large and
    needed whole, with all threads and the device, while the others wait.
    """
    alone = {name for name in jobs if name in rows and prod(rows[name].shape) > LARGE and _needs_whole(rows[name])}

    def with_all_there_is(job: Job) -> Stream[Written]:
        torch.set_num_threads(_processors())
        try:
            with on_device():
                return (yield from job())
        finally:
            torch.set_num_threads(1)

    several = _processors() > 1 and sum(pack.sizes.values()) > SMALL
    ways = {name: partial(with_all_there_is, job) if name in alone else job for name, job in jobs.items()}
    spans = {name: (pack.offsets[name], size) for name, size in pack.sizes.items()}
    return in_order(ways, pack.file, spans, PROCESSES if several else 0, alone)


def _processors() -> int:
    """Return how many processors this process may use: fewer than there are, where it is a job of a cluster."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def results(computation: Computation, name: str, most: int = 0) -> Iterator[Tensor]:
    """Yield a tensor from front to back, in parts where it can be made in parts. Raises as `compute` does.

    A part is there until the next one is asked for.
    most: elements of a part, or of a single row where that has more; 0: as many as pay.
    """
    if cut(computation) is None:
        yield compute(computation, name)
        return
    size, flat = prod(computation.shape), not _needs_rows(computation)
    rows = size if flat else computation.shape[0]
    prepared = _prepared_anew(computation)
    step, larger = (
        min(rows, max(1, (most or max(pays, prepared)) // max(1, size // max(1, rows)))) for pays in (PART, ONE_PASS)
    )
    with ExitStack() as stack:  # what was damaged is said to be so at its end, whatever came out of it
        parts, start = _Parts(computation, name, _Steps(larger, flat, stack)), 0
        while start < rows:
            yield parts.take(min(step, rows - start))
            start += step
            step = larger if parts.noted else step


def _prepared_anew(computation: Computation) -> int:
    """Return how many elements a method takes apart anew for each part, so that a part is made worth it.

    An exact product of 32 bits (`exact.product`) cuts the factor that all rows need into slices.
    """
    along = cut(computation)
    if along is None or DTYPES[computation.dtype].itemsize <= 2:
        return 0
    return sum(prod(each.shape) for each, yes in zip(computation.inputs, along, strict=True) if not yes)


def compute(computation: Computation, name: str) -> Tensor:
    """Compute one tensor. Raises ActionFailed with its name for NaN, Inf and overflow."""
    working = _working(computation)
    tensors = [_fit(name, each, _taken(each), working) for each in computation.inputs]
    result = _function(computation)(*tensors)
    del tensors
    if tuple(result.shape) != computation.shape:
        raise ActionFailed(f"{name} came out of {computation.method} as {list(result.shape)}")
    return rounded(name, result, DTYPES[computation.dtype])


def cut(computation: Computation) -> list[bool] | None:
    """Say which inputs are cut into parts along with the result (the others every part needs), or None if none can be.

    What is elementwise can be cut anywhere, anything else between its rows.
    """
    module = _module(computation)
    shapes = [each.shape for each in computation.inputs]
    if _is_elementwise(computation):
        return [True] * len(shapes)
    by_rows = getattr(module, "by_rows", None)
    found: list[bool] | None = by_rows(computation.parameters, shapes) if by_rows and computation.shape else None
    return found


def _needs_whole(computation: Computation) -> bool:
    """Say whether the tensor, or one that is computed on its way, can only be made whole."""
    inner = [each for each in computation.inputs if isinstance(each, Computation)]
    return cut(computation) is None or any(map(_needs_whole, inner))


def _is_elementwise(computation: Computation) -> bool:
    module = _module(computation)
    same = all(each.shape == computation.shape for each in computation.inputs)
    return same and getattr(module, "ELEMENTWISE", False)


def _needs_rows(computation: Computation) -> bool:
    """Say whether something on the way to a tensor that is made in parts can only be cut between rows."""
    along = cut(computation)
    inner = [each for each, yes in zip(computation.inputs, along or [], strict=False) if yes]
    return along is not None and (
        not _is_elementwise(computation) or any(_needs_rows(each) for each in inner if isinstance(each, Computation))
    )


class _Steps(NamedTuple):
    """How tensors are cut: into how many rows at most (flat: single numbers), and what is open meanwhile."""

    most: int
    flat: bool
    open: ExitStack

    def row(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a row."""
        return () if self.flat else shape[1:]


class _Again(NamedTuple):
    """What the kernel does to parts of one shape, and which of the method's inputs it takes for each of its own.

    Of a product it takes two.
    """

    fused: Fused
    places: list[list[int]]

    @classmethod
    def of(cls, fused: Fused, inputs: list[Tensor | Factors], offered: list[Tensor], own: list[int]) -> Self | None:
        """Return it, or None where the method has to be asked each time: it made something of its inputs by torch.

        inputs: of the kernel; offered: what the method was given; own: places of what each part has of its own.
        """
        known = {_memory(tensor): place for place, tensor in enumerate(offered)}
        places = [[known.get(_memory(t), -1) for t in (x if isinstance(x, Factors) else [x])] for x in inputs]
        taken = {place for each in places for place in each}
        return cls(fused, places) if -1 not in taken and taken.issuperset(own) else None

    def inputs(self, offered: list[Tensor]) -> list[Tensor | Factors]:
        """Return the kernel's inputs of a part."""
        return [
            offered[places[0]] if len(places) == 1 else Factors(offered[places[0]], offered[places[1]])
            for places in self.places
        ]


def _memory(tensor: Tensor) -> tuple[int, int, torch.dtype]:
    """Return what tells whether two tensors that are there at once are the same numbers, in whatever shape."""
    return tensor.data_ptr(), tensor.numel(), tensor.dtype


class _Parts:
    """A computation that is made in parts, with all that is computed on its way."""

    def __init__(self, computation: Computation, name: str, steps: _Steps) -> None:
        self.computation, self.name, self.row = computation, name, steps.row(computation.shape)
        self.function, self.working = _function(computation), _working(computation)
        self.dtype = DTYPES[computation.dtype]
        self.keeps_nan = getattr(_module(computation), "KEEPS_NAN", False)
        self.noted = self.working is not None and not without()  # whether the kernel computes it
        self.again: _Again | None = None  # how, for parts of the last one's shape
        self.given: list[Tensor] = []  # what it was made of, if the next part can lie in the very same tensors
        along = cut(computation)
        assert along is not None
        # what every part needs whole is fitted once
        self.inputs = [
            self._source(each, steps) if yes else _fit(name, each, _taken(each), self.working)
            for each, yes in zip(computation.inputs, along, strict=True)
        ]

    def _source(self, each: Ref | Computation, steps: _Steps) -> _Parts | _Reader | _Made:
        """Return what an input is taken from, part by part. What is little beside the result is fitted at once."""
        if isinstance(each, Ref):
            little = LITTLE * prod(each.shape) <= prod(self.computation.shape)
            return _Made(self._fitted(each, load(each)), steps, fitted=True) if little else _reader(each, steps)
        if cut(each) is None:
            return _Made(_taken(each), steps)
        return _Parts(each, f"{each.component}.{each.name}", steps)

    def take(self, count: int) -> Tensor:
        """Return the next rows."""
        given = [source if isinstance(source, Tensor) else source.take(count) for source in self.inputs]
        same = bool(self.given) and all(map(is_, given, self.given))
        made = self.again.fused.again() if self.again and same else self._in_one_pass(count, given)
        if made is not None:
            return made
        self.given, self.noted = [], False
        tensors = [
            tensor if _is_fitted(source) else self._fitted(each, tensor)
            for each, source, tensor in zip(self.computation.inputs, self.inputs, given, strict=True)
        ]
        result = self.function(*tensors)
        try:
            return rounded(self.name, result, self.dtype)
        except ActionFailed:
            for each, tensor in zip(self.computation.inputs, tensors, strict=True):
                _check(self.name, each, tensor)  # an input's fault is said to be its own
            raise

    def _in_one_pass(self, count: int, given: list[Tensor]) -> Tensor | None:
        """Return the next rows as the kernel makes them; None where it cannot, or something is wrong with numbers."""
        if not self.noted or self.working is None:
            return None
        self.given = []
        shape = torch.Size((count, *self.row))
        offered = [
            tensor if _is_fitted(source) or tensor.shape == shape else self._fitted(each, tensor)
            for each, source, tensor in zip(self.computation.inputs, self.inputs, given, strict=True)
        ]
        if self.again is not None and self.again.fused.shape == shape:
            made = self.again.fused.run(self.again.inputs(offered))
        else:
            made = self._as_noted(Notes(self.working, shape), offered)
        if made is not None and self.again and all(map(is_, offered, given)):
            self.given = given
        return made

    def _as_noted(self, notes: Notes, offered: list[Tensor]) -> Tensor | None:
        """Ask the method what it does to its inputs, and do it; None where that cannot be noted."""
        own = [place for place, source in enumerate(self.inputs) if not isinstance(source, Tensor)]
        try:
            given: list[Any] = list(offered)
            for place in own:
                given[place] = notes.given(offered[place]) if offered[place].shape == notes.shape else offered[place]
            result: Any = self.function(*given)
        except CannotBeNoted:
            return None
        fused = notes.fused(result, self.dtype) if isinstance(result, Noted) else None
        if fused is None:
            return None
        self.again = _Again.of(fused, notes.inputs, offered, own)
        return fused.run(notes.inputs)

    def _fitted(self, each: Ref | Computation, tensor: Tensor) -> Tensor:
        if not self.keeps_nan:
            return _fit(self.name, each, tensor, self.working)
        return tensor if self.working is None else tensor.to(self.working)


class _Reader:
    """A tensor that is read from front to back into one buffer. Leaving it as a context verifies it."""

    def __init__(self, ref: Ref, steps: _Steps) -> None:
        self.ref, self.row = ref, steps.row(ref.shape)
        self.buffer = torch.empty(steps.most * prod(self.row), dtype=DTYPES[ref.dtype])
        self.memory = raw(self.buffer)
        self.rows, self.part = self.buffer[:0], self.memory[:0]  # what the last part was read into
        self.fast = xxhash.xxh3_128()
        self.place = 0
        self.fd = open_regular(Path(ref.path))

    def take(self, count: int) -> Tensor:
        """Return the next rows, until the next call: as many as the last time in the very same tensor."""
        if count != len(self.rows):
            numbers = count * prod(self.row)
            self.rows = self.buffer[:numbers].reshape(count, *self.row)
            self.part = self.memory[: numbers * self.buffer.itemsize]
        self._read(self.part)
        return self.rows

    def _read(self, memory: memoryview) -> None:
        fill(self.fd, memory, self.ref.offset + self.place)
        self.fast.update(memory)
        self.place += memory.nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Read what is left. Raises Damaged if the bytes were not those that were planned with."""
        try:
            while left := min(self.ref.size - self.place, self.memory.nbytes):
                self._read(self.memory[:left])
        finally:
            os.close(self.fd)
        if self.fast.hexdigest() != self.ref.xxh3:
            raise Damaged(self.ref)


class _Made:
    """A tensor that is there whole, taken from front to back. fitted: it has the type that it is computed with."""

    def __init__(self, tensor: Tensor, steps: _Steps, *, fitted: bool = False) -> None:
        self.rows, self.place, self.fitted = tensor.reshape(-1) if steps.flat else tensor, 0, fitted

    def take(self, count: int) -> Tensor:
        """Return the next rows."""
        self.place += count
        return self.rows[self.place - count : self.place]


def _is_fitted(source: Tensor | _Parts | _Reader | _Made) -> bool:
    return isinstance(source, Tensor) or (isinstance(source, _Made) and source.fitted)


def _reader(each: Ref, steps: _Steps) -> _Reader:
    return steps.open.enter_context(_Reader(each, steps))


def _taken(each: Ref | Computation) -> Tensor:
    """Return an input: read, or computed on the way and rounded as if it had been written."""
    return load(each) if isinstance(each, Ref) else compute(each, f"{each.component}.{each.name}")


def _module(computation: Computation) -> ModuleType:
    return module_of(method_groups()[computation.method], computation.method)


def _working(computation: Computation) -> torch.dtype | None:
    """Return the type in which a method is given its inputs, or None for that which they have."""
    if method_groups()[computation.method] != "merges":
        return torch.float64 if getattr(_module(computation), "IN_FP64", False) else None
    if not all(DTYPES[each.dtype].itemsize <= 2 for each in computation.inputs):
        return torch.float64
    # a Python number times an fp32 tensor is rounded to fp32 first, as the promise of class A says
    return None if getattr(_module(computation), "WIDENS", False) else torch.float32


def _fit(name: str, each: Ref | Computation, tensor: Tensor, working: torch.dtype | None) -> Tensor:
    """Return an input in the type that it is computed with. Raises ActionFailed for NaN and Inf."""
    if working is not None and tensor.dtype.itemsize < 4:  # from there it is exact, and takes half the time
        tensor = tensor.to(torch.float32)
    _check(name, each, tensor)
    return tensor if working is None else tensor.to(working)


def _check(name: str, each: Ref | Computation, tensor: Tensor) -> None:
    """Raise ActionFailed for NaN and Inf in an input."""
    if not finite(tensor):
        place, hint = (each.path, GET_AGAIN) if isinstance(each, Ref) else (each.method, UNBOUND)
        raise ActionFailed(f"{name}: an input ({place}) holds NaN or Inf in {each.name}", hint)


def _function(computation: Computation) -> Callable[..., Tensor]:
    module = _module(computation)
    if method_groups()[computation.method] == "merges":
        merge: Any = getattr(module, computation.method)
        return partial(merge, **computation.parameters)
    dtype = DTYPES[computation.dtype]
    return lambda *tensors: module.compute(computation.parameters, list(tensors), dtype)
