"""TIES: task vectors are trimmed, elect signs, and those that agree are averaged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from sdforge.merges._task_vectors import Density, Strengths, joined, kept, simplified, voted
from sdforge.settings import Weight

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2
WIDENS = True
SELECTS = True


def ties(
    base: Tensor,
    *checkpoints: Tensor,
    weights: Strengths = [],  # noqa: B006 -- never written to
    density: Density = 0.2,
    vote: Literal["sum", "count"] = "sum",
    scale: Weight = 1.0,
    normalize: bool = True,
) -> Tensor:
    """Return base + scale · (mean of the trimmed wᵢ (Mᵢ − base) that have the elected sign).

    base: what all descend from, and what gives VAE and tokenizer; checkpoints: one tensor of each, of its shape. Their
    order decides nothing.
    weights: one for each checkpoint; empty: 1 each. density: the share of each difference that is kept, the largest
    by magnitude, of equal ones the first; counted in each tensor by itself.
    vote: `sum` elects the sign of the larger sum (the paper), `count` that of the greater number; a tie is +.
    scale: of the result, the paper's λ. normalize: divide by the sum of the weights that agree, unless it is 0.
    Source: Yadav et al. 2023, https://arxiv.org/abs/2306.01708, algorithm 1; `ties` of mergekit,
    `add_difference_ties` of sd-mecha, `ties_add_difference` of meh.
    """
    strengths = weights or [1.0] * len(checkpoints)
    masks = [kept(base, checkpoint, density) for checkpoint in checkpoints]

    def join(vectors: list[Tensor]) -> Tensor:
        return voted(vectors, strengths, strengths, vote, normalize=normalize) * scale

    return joined(join, base, checkpoints, masks)


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """What has weight 0 or equals the base has no vote and is left out; without any the base passes through."""
    return simplified(inputs, parameters, linear=False)
