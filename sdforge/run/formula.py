"""Formulas: one tensor after the other through a merge or an edit, rounded once, into a pack.

Elementwise arithmetic is fp32 for inputs of at most 16 bits and fp64 otherwise; either gives the same bytes on every
machine, since `+ − × ÷ sqrt` are separate operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdforge.errors import ActionFailed
from sdforge.formats.safetensors import write_file
from sdforge.method import method_groups, module_of
from sdforge.order import Computation, Order, Outcome, Ref
from sdforge.run.tensors import DTYPES, digests, load, raw, rounded

Report = Callable[..., None]


def run_formula(order: Order, report: Report) -> Outcome:
    """Compute the tensors of an order and write them as they come; never more than one tensor's inputs in memory."""
    rows = {f"{c.component}.{c.name}": c for c in order.compute}
    shapes = {name: (c.dtype, c.shape) for name, c in rows.items()}
    components: dict[str, list[list[Any]]] = {}
    done, total = 0, len(rows)

    def content(name: str) -> Iterable[memoryview]:
        nonlocal done
        computation = rows[name]
        tensor = compute(computation, name)
        data = raw(tensor)
        row = [computation.name, computation.dtype, list(computation.shape), *digests(data)]
        components.setdefault(computation.component, []).append(row)
        done += 1
        report(step=done, steps=total)
        yield data

    with torch.inference_mode():
        written = write_file(Path(order.work) / "pack.safetensors", shapes, content)
    for component, table in components.items():
        for row in table:
            row.append(written.offsets[f"{component}.{row[0]}"])
    return Outcome(components=components, pack="pack.safetensors", sha256=written.sha256)


def compute(computation: Computation, name: str) -> Tensor:
    """Compute one tensor. Raises ActionFailed with its name for NaN, Inf and overflow."""
    tensors = [_taken(each) for each in computation.inputs]
    for each, tensor in zip(computation.inputs, tensors, strict=True):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            place = each.path if isinstance(each, Ref) else each.method
            raise ActionFailed(f"{name}: an input ({place}) holds NaN or Inf in {each.name}")
    dtype = DTYPES[computation.dtype]
    group = method_groups()[computation.method]
    module = module_of(group, computation.method)
    if group == "merges":
        # a Python number times an fp32 tensor is rounded to fp32 first, as the promise of class A says
        working = torch.float32 if all(t.dtype.itemsize <= 2 for t in tensors) else torch.float64
        result = getattr(module, computation.method)(*(t.to(working) for t in tensors), **computation.parameters)
    else:
        result = module.compute(computation.parameters, tensors, dtype)
    if tuple(result.shape) != computation.shape:
        raise ActionFailed(f"{name} came out of {computation.method} as {list(result.shape)}")
    return rounded(name, result, dtype)


def _taken(each: Ref | Computation) -> Tensor:
    """Return an input: read, or computed on the way and rounded as if it had been written."""
    return load(each) if isinstance(each, Ref) else compute(each, f"{each.component}.{each.name}")
