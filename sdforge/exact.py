"""Arithmetic that gives the same bits on every machine (class A): sums in a fixed order, scalars in decimal.

Elementwise `+ − × ÷` on arrays need nothing from here, as long as they are separate operations. torch's `sqrt` is
MKL's, which is one unit off in the last place of every sixth fp32 number, so roots are taken by numpy. Library
functions such as `sin` or `acos`, dot products and norms differ between processors and thread counts, so scalars are
computed with 50 decimal digits and reductions in blocks of 65,536 folded by halves, whose sums are added exactly.
The largest numbers of a tensor are chosen exactly, the first of equal ones; random ones come from a counter, so that
neither order nor threads nor what else is drawn decides them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Any

from sdforge.identity import decimal

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 16  # elements
RANKS, ROWS = 128, 256
CONTEXT = Context(prec=50, Emax=10_000, Emin=-10_000)


def complement(weight: float) -> float:
    """Return 1 − weight, computed on the decimals as written."""
    return float(1 - decimal(weight))


def fraction(number: float) -> Fraction:
    """Return the number that a person wrote, exactly: 0.29 · 100 is 29 with it, and 28.999… in floats."""
    return Fraction(decimal(number))


def line(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """Return the point between a (weight 0) and b (weight 1), computed from the nearer end.

    a + w (b − a) or b − (b − a)(1 − w): both ends are exact, and equal inputs stay what they are. A weight may be a
    number, or a tensor that fits the others.
    """
    if isinstance(weight, float | int):
        return a + (b - a) * weight if abs(weight) < 0.5 else b - (b - a) * complement(weight)
    return (a + (b - a) * weight).where(weight.abs() < 0.5, b - (b - a) * (1 - weight))


def root(x: Tensor) -> Tensor:
    """Return √x of every element, rounded correctly (IEEE 754)."""
    import numpy as np
    import torch

    found = torch.empty(x.shape, dtype=x.dtype)
    np.sqrt(x.numpy(), out=found.numpy())
    return found


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


def gram(vectors: list[Tensor]) -> list[list[Decimal]]:
    """Return the dot products of all pairs."""
    found = [[dot(a, b) for b in vectors[: i + 1]] for i, a in enumerate(vectors)]
    return [[found[max(i, j)][min(i, j)] for j in range(len(vectors))] for i in range(len(vectors))]


def column_dots(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ aᵢ·bᵢ over the first dimension of two tensors of one shape, in fp64: one number for each column.

    Blocks of 256 rows (the last one padded with zeros) are folded by halves and added in their order.
    """
    total = a.new_zeros(a.shape[1:]).double()
    for start in range(0, a.shape[0], ROWS):
        rows = min(ROWS, a.shape[0] - start)
        x = total.new_zeros(ROWS, *a.shape[1:])
        x[:rows] = a[start : start + rows].double() * b[start : start + rows].double()
        while x.shape[0] > 1:
            x = x[: x.shape[0] // 2] + x[x.shape[0] // 2 :]
        total = total + x[0]
    return total


def largest(magnitudes: Tensor, count: int) -> Tensor:
    """Return where the `count` largest of some numbers ≥ 0 stand (bool, same shape); of equal ones the first.

    Ties are common: the differences of fp16 weights take few values, and a threshold alone would keep too many.
    """
    import torch

    flat = magnitudes.reshape(-1)
    if count <= 0 or count >= flat.numel():
        return torch.full(magnitudes.shape, count > 0, dtype=torch.bool)
    threshold, above = _threshold(flat, count)
    chosen = flat > threshold
    left = count - above
    for start in range(0, flat.numel(), BLOCK):
        equal = (flat[start : start + BLOCK] == threshold).nonzero().reshape(-1)[:left]
        chosen[start : start + BLOCK][equal] = True
        left -= equal.numel()
        if not left:
            break
    return chosen.reshape(magnitudes.shape)


def _threshold(flat: Tensor, count: int) -> tuple[float, int]:
    """Return the `count`-th largest of some numbers ≥ 0, and how many are larger.

    The bits of such numbers are ordered as whole numbers are. Their digits of 16 bits are counted, the highest first,
    each among the numbers that begin as the one that is sought: nothing is sorted or copied.
    """
    import numpy as np

    numbers = flat.contiguous().numpy()
    bits = numbers.view(f"u{numbers.itemsize}")
    found, above = 0, 0
    for shift in range(8 * numbers.itemsize - 16, -1, -16):
        counts = np.zeros(1 << 16, np.int64)
        for start in range(0, bits.size, BLOCK):
            run = bits[start : start + BLOCK] >> bits.dtype.type(shift)
            begins = run[run >> bits.dtype.type(16) == found]
            counts += np.bincount((begins & bits.dtype.type(0xFFFF)).astype(np.int64), minlength=1 << 16)
        larger = above + counts[::-1].cumsum()[::-1] - counts  # than each digit
        digit = int(np.flatnonzero(larger < count)[0])
        found, above = found << 16 | digit, int(larger[digit])
    return float(np.array(found, bits.dtype).view(numbers.dtype)), above


def share_of(count: int, share: float) -> int:
    """Return how many of `count` things a share of them is: rounded down, but one at least unless it is 0."""
    return max(math.floor(fraction(share) * count), 1) if share > 0 and count else 0


PHILOX = (0xD2511F53, 0xCD9E8D57)  # multipliers of the two halves
WEYL = (0x9E3779B9, 0xBB67AE85)  # what the key grows by in every round
WORDS = 1 << 16  # drawn at once


def philox(key: tuple[int, int], counters: Any) -> Any:
    """Return 4 random 32-bit words for each counter (Philox4x32-10, Salmon et al. 2011, doi 10.1145/2063384.2063405).

    key: two 32-bit words; counters: numpy's (4, n) of uint64, each below 2^32. Returns the same shape.
    """
    import numpy as np

    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    k0, k1 = key
    c0, c1, c2, c3 = counters
    for _ in range(10):
        p0, p1 = c0 * np.uint64(PHILOX[0]), c2 * np.uint64(PHILOX[1])  # below 2^64
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> half) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def random_words(count: int, *names: str) -> Iterator[Tensor]:
    """Yield `count` random whole numbers 0 … 2^32 − 1 in runs of at most 65,536 (int64).

    names: of what is drawn; their sha256 is the key, so that equal names draw equal numbers everywhere. The element at
    place i is word i mod 4 of counter i div 4.
    """
    import numpy as np
    import torch

    digest = hashlib.sha256("\0".join(names).encode()).digest()
    key = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")
    for start in range(0, count, WORDS):
        size = min(WORDS, count - start)
        block = np.arange(start // 4, (start + size + 3) // 4, dtype=np.uint64)
        counters = np.stack([block & np.uint64(0xFFFFFFFF), block >> np.uint64(32), block * 0, block * 0])
        words = philox(key, counters).T.reshape(-1)[:size]
        yield torch.from_numpy(words.astype(np.int64))


def drawn(like: Tensor, share: float | Tensor, *names: str) -> Tensor:
    """Return a random choice among a tensor's elements (bool): each one is chosen with probability `share`.

    share: of all of them, or of each (fp64, of the tensor's shape).
    """
    import torch

    below: Any = math.ceil(fraction(share) * 2**32) if isinstance(share, float | int) else share.reshape(-1) * 2.0**32
    chosen = torch.empty(like.numel(), dtype=torch.bool)
    start = 0
    for words in random_words(like.numel(), *names):
        end = start + words.numel()
        chosen[start:end] = words < (below[start:end] if isinstance(below, torch.Tensor) else below)
        start = end
    return chosen.reshape(like.shape)


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
