"""A checkpoint moved towards another one, no weight further than t."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from sdforge.exact import line
from sdforge.settings import PerBlock, Positive

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2
ELEMENTWISE = True


def nearswap(a: Tensor, b: Tensor, *, t: Annotated[Positive, PerBlock()]) -> Tensor:
    """Return the point between a and b at t / |a − b|, at most b: where they are near, b; elsewhere a step towards it.

    a: what is changed; b: of one shape. t: the step, in the weights' own size (0.001 is much).
    Source: `nearswap` of mergekit, after Alan Ho's merge of language models.
    """
    apart, step = (a - b).abs(), a.new_tensor(t)
    return line(a, b, (step / apart).where(apart > step, 1.0))


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """Equal inputs pass through."""
    a, b = inputs
    return a if a == b else (inputs, parameters)
