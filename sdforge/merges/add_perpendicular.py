"""A checkpoint plus what another one learned across its own direction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from sdforge.exact import gram, in_runs
from sdforge.settings import PerBlock, Weight

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
WIDENS = True


def add_perpendicular(a: Tensor, b: Tensor, base: Tensor, *, weight: Annotated[Weight, PerBlock()] = 1.0) -> Tensor:
    """Return a + weight · v, v the part of b − base that is perpendicular to a − base, each tensor read as one vector.

    a: what is changed; b, base: whose difference is added; all of one shape. Where a equals base it is add_difference.
    weight: how much of it, usually 0 … 1.
    Source: `add_perpendicular` of sd-mecha.
    """
    (length, along), _ = gram(lambda x, y, origin: [x - origin, y - origin], a, b, base)
    if not length:
        return in_runs(lambda x, y, origin: x + (y - origin) * weight, a, b, base)
    share = float(along / length)
    return in_runs(lambda x, y, origin: x + (y - origin - (x - origin) * share) * weight, a, b, base)


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """Weight 0, or b equal to base or a: a passes through. Weight 1 and a equal to base: b does."""
    a, b, base = inputs
    if parameters["weight"] == 0 or b in (base, a):
        return a
    if parameters["weight"] == 1 and a == base:
        return b
    return inputs, parameters
