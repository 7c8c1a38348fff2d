"""The mean of several checkpoints on the sphere: of directions, by angles, and of lengths."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from sdforge.exact import CONTEXT, arccos, gram, half_turn, in_runs, sine
from sdforge.merges._task_vectors import weighed
from sdforge.settings import Positive

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2
WIDENS = True


# A mean of unit vectors that is shorter has no direction, nor has what one leaves of another. Cosines are sums in fp64,
# good to 1e-15, and lengths, their roots, to 1e-7; and dividing by this makes an error of fp32, 6e-8, one of 1 %.
FLAT = Decimal("1e-5")


def karcher(*checkpoints: Tensor, max_iter: Annotated[int, Field(ge=1, le=1000)] = 10, tol: Positive = 1e-5) -> Tensor:
    """Return the Karcher mean of the directions times the mean of the lengths, each tensor read as one vector.

    checkpoints: one tensor of each, of one shape. Their order decides nothing; without a common direction it is their
    mean.
    max_iter, tol: of m ← exp_m(mean of log_m uᵢ) from the mean of the directions uᵢ, until a step is shorter than tol.
    The steps are taken on the directions' coefficients alone, with 50 digits, from the products of the checkpoints.
    Source: Grove & Karcher 1973, https://doi.org/10.1007/BF01214029; `karcher` of mergekit.
    """
    with localcontext(CONTEXT):
        products = gram(lambda *vectors: list(vectors), *checkpoints)
        lengths = [row[i].sqrt() for i, row in enumerate(products)]
        there = [i for i, length in enumerate(lengths) if length]
        cosines = [[products[i][j] / (lengths[i] * lengths[j]) for j in there] for i in there]
        found = _mean(cosines, max_iter, Decimal(tol)) if there else []
        size = sum(lengths, Decimal(0)) / len(lengths)
        factors = [Decimal(1) / len(lengths)] * len(lengths)
        if found:
            directions = dict(zip(there, found, strict=True))
            factors = [
                directions[i] * size / lengths[i] if i in directions else Decimal(0) for i in range(len(lengths))
            ]
    shares = [float(factor) for factor in factors]
    return in_runs(lambda *parts: weighed(list(parts), shares), *checkpoints)


def _mean(cosines: list[list[Decimal]], most: int, tol: Decimal) -> list[Decimal]:
    """Return the mean's coefficients of unit vectors with these cosines; [] where their sum is 0."""
    count = len(cosines)
    mean = _unit([Decimal(1) / count] * count, cosines)
    for _ in range(most if mean else 0):
        step = [Decimal(0)] * count
        for i, row in enumerate(cosines):
            cosine = min(max(_dot(row, mean), Decimal(-1)), Decimal(1))
            height = (1 - cosine * cosine).sqrt()
            if height > FLAT:
                stretch = arccos(cosine) / height / count
                step = [s - stretch * cosine * m for s, m in zip(step, mean, strict=True)]
                step[i] += stretch
        length = max(_form(step, cosines), Decimal(0)).sqrt()
        if length < tol:
            break
        ahead, aside = sine(half_turn() / 2 - length), sine(length) / length
        mean = _unit([ahead * m + aside * s for m, s in zip(mean, step, strict=True)], cosines)
    return mean


def _unit(vector: list[Decimal], cosines: list[list[Decimal]]) -> list[Decimal]:
    length = max(_form(vector, cosines), Decimal(0)).sqrt()
    return [each / length for each in vector] if length > FLAT else []


def _form(vector: list[Decimal], cosines: list[list[Decimal]]) -> Decimal:
    return _dot(vector, [_dot(row, vector) for row in cosines])


def _dot(a: list[Decimal], b: list[Decimal]) -> Decimal:
    return sum((x * y for x, y in zip(a, b, strict=True)), Decimal(0))


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """Equal checkpoints pass through; the others are sorted."""
    return inputs[0] if all(each == inputs[0] for each in inputs) else (sorted(inputs), parameters)
