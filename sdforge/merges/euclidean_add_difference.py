"""Two differences from an ancestor, joined as sides of a right angle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from sdforge.exact import complement, dot, line, root
from sdforge.settings import PerBlock, Share

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1


def euclidean_add_difference(
    a: Tensor, b: Tensor, base: Tensor, *, weight: Annotated[Share, PerBlock()] = 0.5
) -> Tensor:
    """Return base + ‖S‖ · D / ‖D‖, D = ± √((1 − w) x² + w y²) with the signs of S = (1 − w) (a − base) + w (b − base).

    a, b, base: of one shape; x, y: a − base and b − base at length 1, each tensor read as one vector. weight: w.
    Source: `euclidean_add_difference` of meh.
    """
    own, learned = a - base, b - base
    x, y = _unit(own), _unit(learned)
    straight = line(own, learned, weight)
    length = root(x * x * complement(weight) + y * y * weight)
    curved = length.where(straight >= 0, -length)
    size = dot(curved, curved).sqrt()
    return base + curved * float(dot(straight, straight).sqrt() / size) if size else base.clone()


def _unit(vector: Tensor) -> Tensor:
    length = dot(vector, vector).sqrt()
    return vector * float(1 / length) if length else vector


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """The ends, and two equal checkpoints, pass through."""
    a, b, _ = inputs
    if parameters["weight"] == 0 or a == b:
        return a
    return b if parameters["weight"] == 1 else (inputs, parameters)
