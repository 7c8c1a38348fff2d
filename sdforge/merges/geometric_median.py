"""The checkpoint that is nearest to all of several: outliers weigh less than in a mean."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from sdforge.exact import CONTEXT, gram
from sdforge.merges._task_vectors import joined, weighed

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2
WIDENS = True


NEAREST = Decimal("1e-6")  # least distance that is divided by, as a share of the largest between two of the points
ENOUGH = Decimal("1e-40")  # relative change of the sum of distances at which it is found


def geometric_median(*checkpoints: Tensor, max_iter: Annotated[int, Field(ge=1, le=10_000)] = 100) -> Tensor:
    """Return the point with the smallest sum of distances to all, each tensor read as one vector.

    checkpoints: one tensor of each, of one shape. Their order decides nothing.
    max_iter: Weiszfeld's steps from the mean, m ← Σ Mᵢ/‖Mᵢ − m‖ / Σ 1/‖Mᵢ − m‖, at most. They are taken on the shares
    of the checkpoints alone, with 50 digits, from the products of their differences.
    Source: Weiszfeld 1937, https://doi.org/10.1007/s10479-008-0352-z; `geometric_median` of sd-mecha.
    """
    first, *others = checkpoints
    with localcontext(CONTEXT):
        products = gram(lambda origin, *parts: [part - origin for part in parts], first, *others)
        nothing = [Decimal(0)]  # is what the first differs from itself
        shares = _weiszfeld([nothing * len(checkpoints), *(nothing + row for row in products)], max_iter)
    factors = [float(share) for share in shares[1:]]
    return joined(lambda vectors: weighed(vectors, factors), first, others)


def _weiszfeld(products: list[list[Decimal]], most: int) -> list[Decimal]:
    """Return each point's share of the median; products: of all pairs of points."""
    count = len(products)
    shares, before = [Decimal(1) / count] * count, Decimal(-1)
    apart = [products[i][i] + products[j][j] - 2 * products[i][j] for i in range(count) for j in range(i)]
    nearest = NEAREST * max([Decimal(0), *apart]).sqrt()
    for _ in range(most if nearest else 0):
        along = [sum((s * p for s, p in zip(shares, row, strict=True)), Decimal(0)) for row in products]
        square = sum((s * a for s, a in zip(shares, along, strict=True)), Decimal(0))
        distances = [max(products[i][i] - 2 * along[i] + square, Decimal(0)).sqrt() for i in range(count)]
        total = sum(distances, Decimal(0))
        if abs(before - total) <= ENOUGH * total:
            break
        inverse = [1 / max(distance, nearest) for distance in distances]
        shares, before = [each / sum(inverse, Decimal(0)) for each in inverse], total
    return shares


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """Equal checkpoints pass through; the others are sorted."""
    return inputs[0] if all(each == inputs[0] for each in inputs) else (sorted(inputs), parameters)
