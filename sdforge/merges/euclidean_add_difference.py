"""Two differences from an ancestor, joined as sides of a right angle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from sdforge.exact import complement, in_runs, line, root, squares
from sdforge.settings import PerBlock, Share

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
WIDENS = True


def euclidean_add_difference(
    a: Tensor, b: Tensor, base: Tensor, *, weight: Annotated[Share, PerBlock()] = 0.5
) -> Tensor:
    """Return base + ‖S‖ · D / ‖D‖, D = ± √((1 − w) x² + w y²) with the signs of S = (1 − w) (a − base) + w (b − base).

    a, b, base: of one shape; x, y: a − base and b − base at length 1, each tensor read as one vector. weight: w.
    Source: `euclidean_add_difference` of meh.
    """
    lengths = [square.sqrt() for square in squares(lambda x, y, origin: [x - origin, y - origin], a, b, base)]
    to_unit_a, to_unit_b = [float(1 / length) if length else 1.0 for length in lengths]

    def curved_and_straight(a: Tensor, b: Tensor, base: Tensor) -> list[Tensor]:
        own, learned = a - base, b - base
        x, y, straight = own * to_unit_a, learned * to_unit_b, line(own, learned, weight)
        length = root(x * x * complement(weight) + y * y * weight)
        return [length.where(straight >= 0, -length), straight]

    of_curved, of_straight = squares(curved_and_straight, a, b, base)
    if not of_curved:
        return in_runs(lambda origin: origin.clone(), base)
    stretch = float(of_straight.sqrt() / of_curved.sqrt())
    return in_runs(lambda *parts: parts[2] + curved_and_straight(*parts)[0] * stretch, a, b, base)


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """The ends, and two equal checkpoints, pass through."""
    a, b, _ = inputs
    if parameters["weight"] == 0 or a == b:
        return a
    return b if parameters["weight"] == 1 else (inputs, parameters)
