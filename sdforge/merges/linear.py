"""Mean of any number of checkpoints by their shares, in no order."""

from __future__ import annotations

from fractions import Fraction
from math import gcd, lcm
from typing import TYPE_CHECKING, Annotated, Any

from sdforge.errors import SettingErrors
from sdforge.exact import fraction, line
from sdforge.identity import number
from sdforge.settings import PerBlock, Weight

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
ELEMENTWISE = True
KEEPS_NAN = True


Shares = Annotated[list[Weight], PerBlock(shares=True)]


def linear(*checkpoints: Tensor, weights: Shares = []) -> Tensor:  # noqa: B006 -- never written to
    """Return Σ wᵢ·Mᵢ / Σ wᵢ.

    checkpoints: one tensor of each, of one shape. The order in which a recipe names them decides nothing: they are
    sorted by identity before they are added.
    weights: one for each checkpoint; empty: all alike. Shares are computed exactly and rounded once; of two
    checkpoints the result lies on the line between them.
    Source: model soups, Wortsman et al. 2022, https://arxiv.org/abs/2203.05482; `linear` of mergekit, `n_average` of
    sd-mecha, `merge_models.py` of kohya.
    """
    shares = [float(share) for share in _shares(weights or [1.0] * len(checkpoints))]
    if len(checkpoints) == 2:
        return line(*checkpoints, shares[1])
    total = checkpoints[0] * shares[0]
    for tensor, share in zip(checkpoints[1:], shares[1:], strict=True):
        total = total + tensor * share
    return total


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """Leave out what has weight 0 and sort the rest; one alone, or equal inputs, pass through."""
    weights = parameters["weights"] or [1.0] * len(inputs)
    shares = _shares(weights)
    used = sorted((tensor, share) for tensor, share in zip(inputs, shares, strict=True) if share)
    if all(tensor == used[0][0] for tensor, _ in used):
        return used[0][0]
    return [tensor for tensor, _ in used], {"weights": _whole([share for _, share in used])}


def _shares(weights: list[float]) -> list[Fraction]:
    total = sum(map(fraction, weights), Fraction(0))
    if not total:
        message = f"the weights {', '.join(map(number, weights))} sum to 0, and linear divides by their sum"
        raise SettingErrors([("weights", message, "weighted_sum divides by nothing")])
    return [fraction(weight) / total for weight in weights]


def _whole(shares: list[Fraction]) -> list[float]:
    """Return the smallest whole numbers in the same proportions, by which equal mixtures have one name."""
    common = lcm(*(share.denominator for share in shares))
    numbers = [int(share * common) for share in shares]
    return [float(each // gcd(*numbers)) for each in numbers]
