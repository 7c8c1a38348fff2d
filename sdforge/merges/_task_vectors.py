"""What merges of task vectors share: how differences from a base are weighed, put to the vote and added to it.

A task vector is what a checkpoint learned since the base, d = M − base (Ilharco et al. 2022,
https://arxiv.org/abs/2212.04089).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from sdforge.exact import fraction, in_runs, share_of
from sdforge.selection import largest
from sdforge.settings import PerBlock, Weight

if TYPE_CHECKING:
    from torch import Tensor

Strengths = Annotated[list[Weight], PerBlock()]
Density = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Vote = Literal["none", "sum", "count"]
SMALLEST_SUM = Fraction(1, 10**8)  # of weights: below it they are not divided by


def coefficients(weights: list[float], scale: float, *, normalize: bool, by: Fraction = Fraction(1)) -> list[float]:
    """Return scale · wᵢ · by, with `normalize` divided by Σ wᵢ: computed exactly, rounded once."""
    below = sum(map(fraction, weights), Fraction(0)) if normalize else Fraction(1)
    if abs(below) < SMALLEST_SUM:
        below = Fraction(1)
    return [float(fraction(scale) * fraction(weight) * by / below) for weight in weights]


def joined(
    join: Callable[[list[Tensor]], Tensor], base: Tensor, checkpoints: Sequence[Tensor], masks: Sequence[Tensor] = ()
) -> Tensor:
    """Return base + join(vectors), the vectors dᵢ = Mᵢ − base times their masks, computed run by run.

    join: elementwise, of one number or more. masks: none, or for each checkpoint where its vector is kept (bool).
    """
    count = len(checkpoints)
    return in_runs(lambda own, *parts: own + join(masked_vectors(own, parts, count)), base, *checkpoints, *masks)


def masked_vectors(base: Tensor, parts: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return the task vectors of the first `count` parts, times those that follow, their masks (of all, or none)."""
    vectors = [part - base for part in parts[:count]]
    for vector, mask in zip(vectors, parts[count:], strict=False):
        vector *= mask
    return vectors


def weighed(vectors: list[Tensor], factors: list[float]) -> Tensor:
    """Return Σ fᵢ·dᵢ; the products are added in their order."""
    return total([vector * factor for vector, factor in zip(vectors, factors, strict=True)])


def voted(vectors: list[Tensor], factors: list[float], weights: list[float], vote: Vote, *, normalize: bool) -> Tensor:
    """Return what the vectors agree on, element by element (TIES, Yadav et al. 2023, §3).

    Wᵢ = fᵢ·dᵢ. The sign of Σ Wᵢ (`sum`) or of Σ sign Wᵢ (`count`) is elected, 0 counts as +; the Wᵢ of that sign are
    added, and with `normalize` divided by the sum of their weights, as `coefficients` does.
    """
    scaled = [vector * factor for vector, factor in zip(vectors, factors, strict=True)]
    ballots = scaled if vote == "sum" else [one.sign() for one in scaled]
    elected = (total(ballots) >= 0).to(scaled[0].dtype) * 2 - 1
    agree = [one * elected > 0 for one in scaled]
    above = total([one * yes.to(one.dtype) for one, yes in zip(scaled, agree, strict=True)])
    return above / _sums(weights, agree).to(above.dtype) if normalize else above


def _sums(weights: list[float], agree: list[Tensor]) -> Tensor:
    """Return Σ wᵢ of those that agree in each element, 1 where it is nearly 0, in fp64.

    agree: for each weight where it counts (bool). Whole numbers are added, of a unit that measures every weight, so
    that any of the 2ⁿ sums is that of the decimals as written: 0.3 − 0.1 − 0.2 leaves no rest. Weights that no such
    unit of 62 bits measures are rounded to one, far below the smallest sum.
    """
    exact = [fraction(weight) for weight in weights]
    room = 2**62 / max(sum(map(abs, exact), Fraction(0)), SMALLEST_SUM)
    unit = min(Fraction(math.lcm(*(weight.denominator for weight in exact))), room)
    below = total([yes.long() * round(weight * unit) for weight, yes in zip(exact, agree, strict=True)])
    return (below.double() / float(unit)).where(below.abs() >= math.ceil(SMALLEST_SUM * unit), 1.0)


def total(tensors: list[Tensor]) -> Tensor:
    """Return their sum, added in their order."""
    found = tensors[0]
    for tensor in tensors[1:]:
        found = found + tensor
    return found


def kept(base: Tensor, checkpoint: Tensor, density: float, *, outliers: float = 0.0) -> Tensor:
    """Return where the largest elements of a task vector stand, which are kept of it (bool).

    density: the share that is kept; outliers: the share of the very largest that goes too, as long as enough is kept.
    """
    every, few = base.numel(), share_of(base.numel(), density)
    top = min(int(fraction(outliers) * every), every - few)
    chosen = largest(_magnitudes, few + top, base, checkpoint)
    return chosen & ~largest(_magnitudes, top, base, checkpoint) if top else chosen


def _magnitudes(base: Tensor, checkpoint: Tensor) -> Tensor:
    return (checkpoint - base).abs_()


def simplified(
    inputs: list[Any], parameters: dict[str, Any], *, linear: bool, in_places: bool = False
) -> Any | tuple[list[Any], dict[str, Any]]:
    """Leave out checkpoints of weight 0 and those equal to the base; without any the base passes through.

    Those that are left are sorted by identity, so that the order in a recipe decides nothing.
    linear: dᵢ enter as they are: weights, `scale` and `normalize` become one factor each, and a single checkpoint of
    factor 1 passes through. in_places: masks depend on the place in the list, so who is left out leaves a gap.
    """
    base, *others = inputs
    weights = parameters.get("weights") or [1.0] * len(others)
    if parameters.get("vote", "none") == "none":
        weights = coefficients(weights, parameters["scale"], normalize=parameters["normalize"])
        parameters = parameters | {"scale": 1.0, "normalize": False}
    elif parameters["scale"] == 0:
        return base
    pairs = [
        (base, 0.0) if other == base or not weight else (other, weight)
        for other, weight in zip(others, weights, strict=True)
    ]
    used = [pair for pair in pairs if pair[1]]
    if not used:
        return base
    if linear and len(used) == 1 and used[0][1] == 1:
        return used[0][0]
    if in_places:
        while not pairs[-1][1]:
            pairs.pop()
    else:
        pairs = sorted(used)
    return [base, *(other for other, _ in pairs)], parameters | {"weights": [weight for _, weight in pairs]}
