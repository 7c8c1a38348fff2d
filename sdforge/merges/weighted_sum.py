"""Sum of any number of checkpoints, each times its weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from sdforge.exact import line, total_is_one
from sdforge.settings import PerBlock, Weight

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
ELEMENTWISE = True
KEEPS_NAN = True

Weights = Annotated[list[Weight], Field(min_length=1), PerBlock(shares=True)]


def weighted_sum(*checkpoints: Tensor, weights: Weights) -> Tensor:
    """Return Σ wᵢ·Mᵢ; for two checkpoints whose weights sum to 1 the line between them.

    checkpoints: one tensor of each, of one shape, in the order in which they are added.
    weights: one for each checkpoint. They need not sum to 1; on the decimals as written, 0.6 + 0.3 + 0.1 does.
    Two of sum 1 are computed from the nearer end, a + w (b − a) or b − (b − a)(1 − w), which returns both ends exactly
    and equal inputs unchanged.
    Source: model soups, Wortsman et al. 2022, https://arxiv.org/abs/2203.05482; "Weighted sum" of A1111's merger;
    `triple_sum` of meh and SuperMerger.
    """
    if len(checkpoints) == 2 and total_is_one(tuple(weights)):
        return line(*checkpoints, weights[1])
    total = checkpoints[0] * weights[0]
    for tensor, weight in zip(checkpoints[1:], weights[1:], strict=True):
        total = total + tensor * weight
    return total


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """Leave out what has weight 0; a single weight of 1, or equal inputs whose weights sum to 1, passes through."""
    used = [(tensor, weight) for tensor, weight in zip(inputs, parameters["weights"], strict=True) if weight != 0]
    weights = [weight for _, weight in used]
    if used and all(tensor == used[0][0] for tensor, _ in used) and total_is_one(tuple(weights)):
        return used[0][0]
    if not used:
        return inputs[:1], {"weights": [0.0]}
    return [tensor for tensor, _ in used], {"weights": weights}
