"""A checkpoint plus what another one learned that it does not know already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from sdforge.exact import fraction
from sdforge.settings import PerBlock, Weight

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
ELEMENTWISE = True


def train_difference(
    a: Tensor, b: Tensor, base: Tensor, *, weight: Annotated[Weight, PerBlock()] = 1.0, gain: Weight = 1.8
) -> Tensor:
    """Return a + gain · weight · s (b − base), s = |b − a| / (|b − base| + |b − a|), 0 where both are 0.

    a: what is changed; b, base: whose difference is added; all of one shape. Where a already is what b is, nothing is
    added: as if a had been trained on what b was.
    weight: how much of the difference, usually 0 … 1. gain: makes up for s, which is 1/2 where a equals base.
    Source: "trainDifference" of SuperMerger, whose gain is 1.8.
    """
    learned, apart = (b - base).abs(), (b - a).abs()
    both = learned + apart
    share = apart / both.where(both != 0, 1.0)
    return a + (b - base) * (share * float(fraction(gain) * fraction(weight)))


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """Nothing is added at weight 0, and where b equals base or a."""
    a, b, base = inputs
    if 0 in (parameters["weight"], parameters["gain"]) or b in (base, a):
        return a
    return inputs, parameters
