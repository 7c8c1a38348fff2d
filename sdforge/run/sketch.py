"""A sketch of an update: 64 numbers and a norm, by which the distance of two results can be told without their bytes.

Every projection multiplies a matrix from both sides with seeded signs, uᵀ·ΔW·v, and is summed over the matrices: its
square has the expectation ‖ΔW‖² (Johnson–Lindenstrauss with rank-one sign matrices), and of a low-rank update only
the factors are needed.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sdforge.run.seeds import generator

LINES = 64


def sketch(updates: Iterable[tuple[str, Tensor | Callable[[], Tensor], Tensor | None]]) -> tuple[str, float]:
    """Return (base64 of 64 little-endian fp32 projections, the update's Frobenius norm).

    updates: (name, matrix (m, n), None), or (name, up (m, r), down (r, n)) for their product. Instead of a matrix what
    returns it, so that large ones need not be there all at once.
    """
    lines, squares = torch.zeros(LINES, dtype=torch.float64), 0.0
    for name, left, right in sorted(updates, key=lambda row: row[0]):
        a = (left if isinstance(left, Tensor) else left()).detach().double().cpu()
        b = right.detach().double().cpu() if right is not None else None
        width = a.shape[1] if b is None else b.shape[1]
        u, v = _signs(name, "rows", a.shape[0]), _signs(name, "columns", width)
        if b is None:
            lines += ((u @ a) * v).sum(1)
            squares += float((a * a).sum())
        else:
            lines += ((u @ a) * (v @ b.T)).sum(1)
            squares += float(((a.T @ a) * (b @ b.T)).sum())
    data = struct.pack(f"<{LINES}f", *lines.tolist())
    return base64.b64encode(data).decode(), squares**0.5


def _signs(name: str, side: str, count: int) -> Tensor:
    bits = torch.randint(0, 2, (LINES, count), generator=generator(0, f"sketch {side} {name}"))
    return bits.double() * 2 - 1
