"""Formulas: tensors through a merge or an edit, rounded once, into a pack.

Elementwise arithmetic is fp32 for inputs of at most 16 bits and fp64 otherwise; either gives the same bytes on every
machine, since `+ − × ÷ sqrt` are separate operations.
What is made element by element, or row by row, is read, computed and written in parts that stay in the caches, on two
threads; only what needs a whole tensor holds one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import xxhash
from torch import Tensor

from sdforge.errors import ActionFailed
from sdforge.formats.safetensors import fill
from sdforge.method import method_groups, module_of
from sdforge.order import Computation, Damaged, Order, Outcome, Ref
from sdforge.run.tensors import DTYPES, PART, Pack, finite, load, raw, rounded
from sdforge.store.files import open_regular

Report = Callable[..., None]
THREADS = 2  # reading and writing memory is what takes the time: more are no faster, and each holds a tensor
LARGE = 1 << 22  # elements; of larger tensors that are needed whole only one is in memory


def run_formula(order: Order, report: Report) -> Outcome:
    """Compute the tensors of an order and write them into one pack."""
    rows = {f"{c.component}.{c.name}": c for c in order.compute}
    names: dict[str, list[str]] = {}
    for c in order.compute:
        names.setdefault(c.component, []).append(c.name)
    with Pack(Path(order.work) / "pack.safetensors", {name: (c.dtype, c.shape) for name, c in rows.items()}) as pack:
        in_order = {name: rows[name] for name in pack.order}
        alone = [name for name, c in in_order.items() if prod(c.shape) > LARGE and cut(c) is None]
        done = 0
        for name in _made(pack, in_order, alone):
            done += 1
            report(step=done, steps=len(rows))
        return pack.outcome(names)


def _made(pack: Pack, rows: dict[str, Computation], alone: list[str]) -> Iterator[str]:
    """Make every tensor, and yield its name when it is written: the large ones after all others, one by one."""

    def make(name: str) -> str:
        with torch.inference_mode():
            pack.write(name, results(rows[name], name))
        return name

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    with ThreadPoolExecutor(min(THREADS, cores)) as pool:
        try:
            yield from pool.map(make, [name for name in rows if name not in alone])
        finally:
            pool.shutdown(cancel_futures=True)
    torch.set_num_threads(cores)
    yield from map(make, alone)


def results(computation: Computation, name: str) -> Iterator[Tensor]:
    """Yield a tensor from front to back, in parts where it can be made in parts. Raises as `compute` does."""
    widths = cut(computation)
    if widths is None:
        yield compute(computation, name)
    else:
        yield from _in_parts(computation, name, widths)


def compute(computation: Computation, name: str) -> Tensor:
    """Compute one tensor. Raises ActionFailed with its name for NaN, Inf and overflow."""
    working = _working(computation)
    tensors = []
    for ref in computation.inputs:
        tensor = load(ref).to(working) if working else load(ref)
        _refuse_broken(name, ref, tensor)
        tensors.append(tensor)
    result = _function(computation)(*tensors)
    del tensors, tensor
    if tuple(result.shape) != computation.shape:
        raise ActionFailed(f"{name} came out of {computation.method} as {list(result.shape)}")
    return rounded(name, result, DTYPES[computation.dtype])


def cut(computation: Computation) -> list[int] | None:
    """Say how a tensor can be made in parts, or None if it cannot.

    Returns for each input how many of its elements belong to one row of the result (one element where all is
    elementwise); 0 for what every row needs whole.
    """
    module = module_of(method_groups()[computation.method], computation.method)
    shapes = [ref.shape for ref in computation.inputs]
    if getattr(module, "ELEMENTWISE", False) and all(shape == computation.shape for shape in shapes):
        return [1] * len(shapes)
    by_rows = getattr(module, "by_rows", None)
    along = by_rows(computation.parameters, shapes) if by_rows and computation.shape else None
    return along and [prod(shape[1:]) if yes else 0 for yes, shape in zip(along, shapes, strict=True)]


def _in_parts(computation: Computation, name: str, widths: list[int]) -> Iterator[Tensor]:
    function, working, dtype = _function(computation), _working(computation), DTYPES[computation.dtype]
    flat = all(width == 1 for width in widths)
    rows = prod(computation.shape) if flat else computation.shape[0]
    step = max(1, PART // max(1, *widths))
    with ExitStack() as stack:  # what was damaged is said to be so at its end, whatever came out of it
        readers = [
            stack.enter_context(_Reader(ref, step * width)) if width else _Whole(ref)
            for ref, width in zip(computation.inputs, widths, strict=True)
        ]
        for start in range(0, rows, step):
            count = min(step, rows - start)
            tensors = []
            for reader, width in zip(readers, widths, strict=True):
                tensor = reader.next(count * width)
                tensor = tensor if flat or not width else tensor.reshape(count, *reader.ref.shape[1:])
                tensor = tensor.to(working) if working else tensor
                _refuse_broken(name, reader.ref, tensor)
                tensors.append(tensor)
            yield rounded(name, function(*tensors), dtype)


class _Reader:
    """A tensor that is read from front to back into one buffer. Leaving it as a context verifies it."""

    def __init__(self, ref: Ref, most: int) -> None:
        """most: elements that are read at once."""
        self.ref = ref
        self.buffer = torch.empty(min(most, prod(ref.shape)), dtype=DTYPES[ref.dtype])
        self.memory = raw(self.buffer)
        self.fast = xxhash.xxh3_128()
        self.place = 0
        self.fd = open_regular(Path(ref.path))

    def next(self, count: int) -> Tensor:
        """Return the next elements, until the next call."""
        memory = self.memory[: count * self.buffer.itemsize]
        fill(self.fd, memory, self.ref.offset + self.place)
        self.fast.update(memory)
        self.place += memory.nbytes
        return self.buffer[:count]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Read what is left. Raises Damaged if the bytes were not those that were planned with."""
        try:
            while left := min(self.ref.size - self.place, self.memory.nbytes):
                self.next(left // self.buffer.itemsize)
        finally:
            os.close(self.fd)
        if self.fast.hexdigest() != self.ref.xxh3:
            raise Damaged(self.ref)


class _Whole:
    """A tensor that every part needs."""

    def __init__(self, ref: Ref) -> None:
        self.ref, self.tensor = ref, load(ref)

    def next(self, count: int) -> Tensor:  # noqa: ARG002 -- as a reader
        return self.tensor


def _refuse_broken(name: str, ref: Ref, tensor: Tensor) -> None:
    if not finite(tensor):
        raise ActionFailed(f"{name}: an input ({ref.path}) holds NaN or Inf in {ref.name}")


def _working(computation: Computation) -> torch.dtype | None:
    """Return the type in which a merge computes; edits choose their own."""
    if method_groups()[computation.method] != "merges":
        return None
    # a Python number times an fp32 tensor is rounded to fp32 first, as the promise of class A says
    narrow = all(DTYPES[ref.dtype].itemsize <= 2 for ref in computation.inputs)
    return torch.float32 if narrow else torch.float64


def _function(computation: Computation) -> Callable[..., Tensor]:
    group = method_groups()[computation.method]
    module = module_of(group, computation.method)
    if group == "merges":
        merge: Any = getattr(module, computation.method)
        return partial(merge, **computation.parameters)
    dtype = DTYPES[computation.dtype]
    return lambda *tensors: module.compute(computation.parameters, list(tensors), dtype)
