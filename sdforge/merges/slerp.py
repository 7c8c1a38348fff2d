"""Spherical interpolation of two checkpoints."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from sdforge.exact import arc_weights, gram, in_runs, line
from sdforge.settings import PerBlock, Share

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
WIDENS = True


def slerp(
    a: Tensor,
    b: Tensor,
    *,
    weight: Annotated[Share, PerBlock()] = 0.5,
    parallel: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.9995,
) -> Tensor:
    """Move from a (weight 0) to b (weight 1) along the arc between them, each tensor read as one vector.

    a, b: of one shape; their lengths are kept as they are, (sin((1−t)θ) a + sin(tθ) b) / sin θ.
    parallel: |cosine| from which on the arc is too flat to divide by and the straight line serves.
    Source: Shoemake 1985, https://doi.org/10.1145/325165.325242; unnormalised ends as in mergekit's slerp.
    """
    (aa, ab), (_, bb) = gram(lambda *vectors: list(vectors), a, b)
    lengths = aa.sqrt() * bb.sqrt()
    cosine = ab / lengths if lengths else Decimal(1)
    if abs(float(cosine)) > parallel:
        return in_runs(lambda x, y: line(x, y, weight), a, b)
    at_a, at_b = arc_weights(cosine, weight)
    return in_runs(lambda x, y: x * at_a + y * at_b, a, b)


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """The ends and equal inputs pass through."""
    a, b = inputs
    if parameters["weight"] == 0 or a == b:
        return a
    if parameters["weight"] == 1:
        return b
    return inputs, parameters
