"""Arithmetic that gives the same bits on every machine (class A): sums in a fixed order, scalars in decimal.

Elementwise `+ − × ÷` on arrays need nothing from here, as long as they are separate operations. torch's `sqrt` is
MKL's, which is one unit off in the last place of every sixth fp32 number, so roots are taken by numpy. Library
functions such as `sin` or `acos`, dot products and norms differ between processors and thread counts, so scalars are
computed with 50 decimal digits and reductions in blocks of 65,536 folded by halves, whose sums are added exactly.
Random numbers come from a counter, so that neither order nor threads nor what else is drawn decides them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

from sdforge.identity import decimal

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 16  # elements
RANKS, ROWS = 128, 256
CONTEXT = Context(prec=50, Emax=10_000, Emin=-10_000)


@cache
def complement(weight: float) -> float:
    """Return 1 − weight, computed on the decimals as written."""
    return float(1 - decimal(weight))


@cache
def total_is_one(weights: tuple[float, ...]) -> bool:
    """Say whether weights sum to 1, on the decimals as written."""
    return sum(map(decimal, weights)) == 1


def fraction(number: float) -> Fraction:
    """Return the number that a person wrote, exactly: 0.29 · 100 is 29 with it, and 28.999… in floats."""
    return Fraction(decimal(number))


def line(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """Return the point between a (weight 0) and b (weight 1), computed from the nearer end.

    a + w (b − a) or b − (b − a)(1 − w): both ends are exact, and equal inputs stay what they are. A weight may be a
    number, or a tensor that fits the others.
    """
    import torch

    if isinstance(weight, float | int):
        way = b - a
        if abs(weight) < 0.5:
            return way.mul_(weight).add_(a)
        return torch.sub(b, way.mul_(complement(weight)), out=way)
    return (a + (b - a) * weight).where(weight.abs() < 0.5, b - (b - a) * (1 - weight))


def root(x: Tensor) -> Tensor:
    """Return √x of every element, rounded correctly (IEEE 754)."""
    import numpy as np
    import torch

    found = torch.empty(x.shape, dtype=x.dtype)
    np.sqrt(x.numpy(), out=found.numpy())
    return found


def in_runs(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return function(*tensors) for an elementwise one, computed run by run: beside the result no whole tensor is held.

    tensors: of as many rows (along the first dimension) as the first, whose shape and type the result has. A run is as
    many rows as hold 65,536 elements, one at least, and stays in the processor's cache; the function sees it widened.
    """
    import torch

    first = tensors[0]
    step = max(1, BLOCK // max(1, prod(first.shape[1:])))
    if first.dim() == 0 or first.shape[0] <= step:
        return function(*map(widened, tensors))
    result = torch.empty(first.shape, dtype=widened(first[:0]).dtype)
    for start in range(0, first.shape[0], step):
        result[start : start + step] = function(*(widened(tensor[start : start + step]) for tensor in tensors))
    return result


def runs(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the elements of tensors of one shape in C order, 65,536 of each at a time, widened.

    Of empty tensors it is one empty run.
    """
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, max(1, flat[0].numel()), BLOCK):
        yield tuple(widened(tensor[start : start + BLOCK]) for tensor in flat)


def widened(tensor: Tensor) -> Tensor:
    """Return numbers of at most 16 bits as fp32, in which they are computed; masks and wider ones as they are."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize <= 2 else tensor


def dot(a: Tensor, b: Tensor) -> Decimal:
    """Return Σ aᵢ·bᵢ of two tensors of one shape, the same on every machine (see `sums`)."""
    (found,) = sums(lambda x, y: [x.double() * y.double()], a, b)
    return found


def gram(function: Callable[..., list[Tensor]], *tensors: Tensor) -> list[list[Decimal]]:
    """Return the dot products of all pairs of vectors, which an elementwise function makes of tensors of one shape."""

    def products(*parts: Tensor) -> list[Tensor]:
        wide = [vector.double() for vector in function(*parts)]
        return [x * y for i, x in enumerate(wide) for y in wide[: i + 1]]

    lower = sums(products, *tensors)
    count = math.isqrt(2 * len(lower))
    rows = [lower[i * (i + 1) // 2 : (i + 1) * (i + 2) // 2] for i in range(count)]
    return [[rows[max(i, j)][min(i, j)] for j in range(count)] for i in range(count)]


def squares(function: Callable[..., list[Tensor]], *tensors: Tensor) -> list[Decimal]:
    """Return the square of the length of each vector that an elementwise function makes of tensors of one shape."""
    return sums(lambda *parts: [wide * wide for wide in (v.double() for v in function(*parts))], *tensors)


def sums(function: Callable[..., list[Tensor]], *tensors: Tensor) -> list[Decimal]:
    """Return Σ over all elements of each fp64 tensor that an elementwise function makes of tensors of one shape.

    Runs of 65,536 elements (the last one padded with zeros) are folded by halves, 16 additions each; the runs' sums are
    added without error and rounded once.
    """
    folded = []
    for parts in runs(*tensors):
        terms = function(*parts)
        x = terms[0].new_zeros(len(terms), BLOCK) if parts[0].numel() < BLOCK else terms[0].new_empty(len(terms), BLOCK)
        for row, term in zip(x, terms, strict=True):
            row[: term.numel()] = term
        folded.append(_folded(x).tolist())
    return [Decimal(math.fsum(column)) for column in zip(*folded, strict=True)]


def _folded(x: Tensor) -> Tensor:
    """Return the sum of each row of (rows, 2ⁿ), halves added to halves."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x[:, 0]


def row_norms(rows: Tensor) -> Tensor:
    """Return ‖row‖ for what stands along the first dimension, fp64, the same on every machine.

    Squares are folded by halves, padded with zeros; ROWS rows at a time.
    """
    norms = rows.new_empty(rows.shape[0]).double()
    width = prod(rows.shape[1:])
    for start in range(0, rows.shape[0], ROWS):
        part = rows[start : start + ROWS]
        squares = norms.new_zeros(len(part), 1 << max(0, width - 1).bit_length())
        squares[:, :width] = part.reshape(len(part), width).double().square()
        norms[start : start + ROWS] = _folded(squares).sqrt()
    return norms


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


def column_dots(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ aᵢ·bᵢ over the first dimension of two tensors of one shape, in fp64: one number for each column.

    Blocks of 256 rows (the last one padded with zeros up to a power of two) are folded by halves and added in their
    order.
    """
    total = a.new_zeros(a.shape[1:]).double()
    for start in range(0, a.shape[0], ROWS):
        rows = min(ROWS, a.shape[0] - start)
        x = total.new_zeros(1 << (rows - 1).bit_length(), *a.shape[1:])
        x[:rows] = a[start : start + rows].double() * b[start : start + rows].double()
        while x.shape[0] > 1:
            x = x[: x.shape[0] // 2] + x[x.shape[0] // 2 :]
        total = total + x[0]
    return total


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


def random_words(count: int, *names: str, start: int = 0) -> Iterator[Tensor]:
    """Yield `count` random whole numbers 0 … 2^32 − 1, from the place `start` on, in runs of at most 65,536 (int64).

    names: of what is drawn; their sha256 is the key, so that equal names draw equal numbers everywhere. The element at
    place i is word i mod 4 of counter i div 4.
    """
    import numpy as np
    import torch

    digest = hashlib.sha256("\0".join(names).encode()).digest()
    key = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")
    for first in range(start, start + count, WORDS):
        end = min(first + WORDS, start + count)
        block = np.arange(first // 4, (end + 3) // 4, dtype=np.uint64)
        counters = np.stack([block & np.uint64(0xFFFFFFFF), block >> np.uint64(32), block * 0, block * 0])
        words = philox(key, counters).T.reshape(-1)[first % 4 :][: end - first]
        yield torch.from_numpy(words.astype(np.int64))


def drawn(like: Tensor, share: float | Tensor, *names: str, start: int = 0) -> Tensor:
    """Return a random choice among a tensor's elements (bool): each one is chosen with probability `share`.

    share: of all of them, or of each (fp64, of the tensor's shape). start: the place of the first of them, where they
    are a part of what is drawn.
    """
    import torch

    below: Any = math.ceil(fraction(share) * 2**32) if isinstance(share, float | int) else share.reshape(-1) * 2.0**32
    chosen = torch.empty(like.numel(), dtype=torch.bool)
    done = 0
    for words in random_words(like.numel(), *names, start=start):
        end = done + words.numel()
        chosen[done:end] = words < (below[done:end] if isinstance(below, torch.Tensor) else below)
        done = end
    return chosen.reshape(like.shape)


def product(up: Tensor, down: Tensor, *, sliced: bool, like: Tensor | None = None) -> Tensor:
    """Return up @ down in fp64 for factors of at most 32 bits; up: (out, rank), down: (rank, in).

    like: a weight whose shape it gets. Where that is noted for the compiled kernel (`run/fused.py`), and the result is
    not sliced, so is the product.

    Ranks are added in chunks of 128, rows are computed in blocks of 256. Rounded to 16 bits the result is the same on
    every machine (measured: no flip in 242 million weights under hostile orders). With `sliced` every bit of the fp64
    result is: each factor is split into two slices of 23 bits on a grid per row (column), whose products are sums of
    integers below 2^53 and so without rounding in any order (Ozaki et al. 2012, doi 10.1007/s11075-011-9478-1).
    """
    import torch

    assert up.shape[1]  # nothing would be written over what lies in the memory
    if like is not None:
        noted = noted_products(like, [(up, down)], sliced=sliced)
        return (noted[0] if noted else product(up, down, sliced=sliced)).reshape(like.shape)
    result = up.new_empty(up.shape[0], down.shape[1], dtype=torch.float64)
    for start in range(0, up.shape[1], RANKS):
        a, b = up[:, start : start + RANKS].double(), down[start : start + RANKS].double()
        lefts, rights = (_slices(a, 1), _slices(b, 0)) if sliced else ((a,), (b,))
        for row in range(0, len(result), ROWS):
            rows = result[row : row + ROWS]
            part = _summed([left[row : row + ROWS] for left in lefts], rights)
            if start:
                rows.add_(part)
            elif len(part) == len(result):
                result = part
            else:
                rows.copy_(part)
    return result


def noted_products(like: Tensor, factors: Sequence[tuple[Tensor, Tensor]], *, sliced: bool) -> Sequence[Tensor]:
    """Return up @ down of each pair, noted for the compiled kernel; nothing where torch has to make them."""
    found: Sequence[Tensor] = () if sliced else getattr(like, "products", lambda _: ())(factors)
    return found


def _summed(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    """Return the product of two matrices, each the sum of its slices: one, or two of which the first is larger."""
    if len(lefts) == 1:
        return lefts[0] @ rights[0]
    (left, left_rest), (right, right_rest) = lefts, rights
    middle = (left @ right_rest).add_(left_rest @ right)
    return (left @ right).add_(middle).add_(left_rest @ right_rest)


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
