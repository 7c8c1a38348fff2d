"""Arithmetic that gives the same bits on every machine (class A): sums in a fixed order, scalars in decimal.

Elementwise `+ − × ÷ sqrt` on arrays need nothing from here, as long as they are separate operations. Library
functions such as `sin` or `acos`, dot products and norms differ between processors and thread counts, so scalars are
computed with 50 decimal digits and reductions in blocks of 65,536 folded by halves, whose sums are added exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Context, Decimal, localcontext
from functools import cache
from typing import TYPE_CHECKING

from sdforge.identity import decimal

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 16  # elements
RANKS, ROWS = 128, 256
CONTEXT = Context(prec=50, Emax=10_000, Emin=-10_000)


def complement(weight: float) -> float:
    """Return 1 − weight, computed on the decimals as written."""
    return float(1 - decimal(weight))


def dot(a: Tensor, b: Tensor) -> Decimal:
    """Return Σ aᵢ·bᵢ of two tensors of one shape, the same on every machine.

    Products and the folding of a block (by halves, 16 additions, the last one padded with zeros) are fp64; the
    blocks' sums are added without error and rounded once.
    """
    return Decimal(math.fsum(_block_sums(a, b)))


def _block_sums(a: Tensor, b: Tensor) -> Iterator[float]:
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    for start in range(0, flat_a.numel(), BLOCK):
        x = flat_a[start : start + BLOCK].double() * flat_b[start : start + BLOCK].double()
        if x.numel() < BLOCK:
            padded = x.new_zeros(BLOCK)
            padded[: x.numel()] = x
            x = padded
        while x.numel() > 1:
            half = x.numel() // 2
            x = x[:half] + x[half:]
        yield float(x)


def row_norms(matrix: Tensor) -> Tensor:
    """Return ‖row‖ of a matrix, fp64, the same on every machine: squares are folded by halves, padded with zeros."""
    squares = matrix.double().square()
    width = 1 << max(0, squares.shape[1] - 1).bit_length()
    if width > squares.shape[1]:
        padded = squares.new_zeros(squares.shape[0], width)
        padded[:, : squares.shape[1]] = squares
        squares = padded
    while squares.shape[1] > 1:
        half = squares.shape[1] // 2
        squares = squares[:, :half] + squares[:, half:]
    return squares[:, 0].sqrt()


def solve(a: Tensor, b: Tensor) -> Tensor:
    """Return a⁻¹ b of batches (K, B, B) in fp64, the same on every machine (elimination, elementwise).

    Nothing is exchanged, so a's symmetric part must be positive definite, as that of I − Q is for skew Q.
    """
    a, b = a.clone(), b.clone()
    for i in range(a.shape[-1]):
        pivot = a[:, i : i + 1, i : i + 1].clone()
        row_a, row_b = a[:, i : i + 1] / pivot, b[:, i : i + 1] / pivot
        column = a[:, :, i : i + 1].clone()
        a, b = a - column * row_a, b - column * row_b
        a[:, i : i + 1], b[:, i : i + 1] = row_a, row_b
    return b


def product(up: Tensor, down: Tensor, *, sliced: bool) -> Tensor:
    """Return up @ down in fp64 for factors of at most 32 bits; up: (out, rank), down: (rank, in).

    Ranks are added in chunks of 128, rows are computed in blocks of 256. Rounded to 16 bits the result is the same on
    every machine (measured: no flip in 242 million weights under hostile orders). With `sliced` every bit of the fp64
    result is: each factor is split into two slices of 23 bits on a grid per row (column), whose products are sums of
    integers below 2^53 and so without rounding in any order (Ozaki et al. 2012, doi 10.1007/s11075-011-9478-1).
    """
    total = None
    for start in range(0, up.shape[1], RANKS):
        a, b = up[:, start : start + RANKS].double(), down[start : start + RANKS].double()
        if sliced:
            (a1, a2), (b1, b2) = _slices(a, 1), _slices(b, 0)
            part = _rows(a1, b1) + (_rows(a1, b2) + _rows(a2, b1)) + _rows(a2, b2)
        else:
            part = _rows(a, b)
        total = part if total is None else total + part
    assert total is not None
    return total


def _rows(a: Tensor, b: Tensor) -> Tensor:
    result = a.new_empty(a.shape[0], b.shape[1])
    for start in range(0, a.shape[0], ROWS):
        result[start : start + ROWS] = a[start : start + ROWS] @ b
    return result


def _slices(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return the leading 23 bits of x, counted from the largest value along `axis`, and the next 23."""
    _, exponent = x.abs().amax(axis, keepdim=True).frexp()
    grid = x.new_ones(exponent.shape).ldexp(exponent - 22)
    first = (x / grid).round() * grid
    fine = grid.ldexp(x.new_tensor(-23).int())
    return first, ((x - first) / fine).round() * fine


def arc_weights(cosine: Decimal, weight: float) -> tuple[float, float]:
    """Return sin((1−t)θ)/sin θ and sin(tθ)/sin θ for θ = arccos(cosine), |cosine| < 1, t = weight in 0 … 1."""
    with localcontext(CONTEXT):
        angle = arccos(cosine)
        t = decimal(weight)
        return float(sine((1 - t) * angle) / sine(angle)), float(sine(t * angle) / sine(angle))


def sine(x: Decimal) -> Decimal:
    """Return sin x for |x| ≤ 4, to the precision of the current context (Taylor series)."""
    term, total, n = x, x, 1
    while True:
        term = -term * x * x / ((n + 1) * (n + 2))
        n += 2
        if total + term == total:
            return +total
        total += term


def arctan(x: Decimal) -> Decimal:
    """Return arctan x for x ≥ 0 (three halvings of the argument, then the Taylor series)."""
    for _ in range(3):
        x = x / (1 + (1 + x * x).sqrt())
    term, total, n = x, x, 1
    while True:
        term = -term * x * x
        n += 2
        if total + term / n == total:
            return 8 * total
        total += term / n


@cache
def half_turn() -> Decimal:
    """Return π to 50 digits."""
    with localcontext(CONTEXT):
        return 4 * arctan(Decimal(1))


def arccos(x: Decimal) -> Decimal:
    """Return arccos x for −1 < x < 1."""
    angle = 2 * arctan(((1 - abs(x)) / (1 + abs(x))).sqrt())
    return angle if x >= 0 else half_turn() - angle
