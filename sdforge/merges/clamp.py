"""A checkpoint whose weights are kept within the range of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdforge.exact import line
from sdforge.settings import Share

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
ELEMENTWISE = True


def clamp(a: Tensor, *checkpoints: Tensor, stiffness: Share = 0.0) -> Tensor:
    """Return min(max(a, lowest), highest), the limits taken from the checkpoints, element by element.

    a: usually a merge; checkpoints: usually what it was made from; all of one shape. Their order decides nothing. In a
    merge's own type the result is what clamping before rounding would give.
    stiffness: pulls each limit towards the one among them that is nearest to their mean on its side, at 1 all the way.
    Source: `clamp` of sd-mecha; `weights_clip` of meh.
    """
    lowest = highest = total = checkpoints[0]
    for each in checkpoints[1:]:
        lowest, highest, total = each.where(each < lowest, lowest), each.where(each > highest, highest), total + each
    if stiffness:
        mean, above, below = total * (1 / len(checkpoints)), highest, lowest
        for each in checkpoints:
            above = each.where((each >= mean) & (each <= above), above)
            below = each.where((each <= mean) & (each >= below), below)
        lowest, highest = line(lowest, below, stiffness), line(highest, above, stiffness)
    kept = a.where(a > lowest, lowest)  # `maximum` of 0 and −0 is not the same on every machine
    return kept.where(kept < highest, highest)


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """Equal limits leave no choice; one of the limits itself is within them, unless they are stiff."""
    a, *limits = inputs
    if all(each == limits[0] for each in limits):
        return limits[0]
    if not parameters["stiffness"]:
        return a if a in limits else ([a, *sorted(set(limits))], parameters)
    return [a, *sorted(limits)], parameters
