"""Model breadcrumbs: task vectors without their outliers and without their smallest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdforge.merges._task_vectors import (
    Density,
    Strengths,
    Vote,
    coefficients,
    joined,
    kept,
    simplified,
    voted,
    weighed,
)
from sdforge.settings import Share, Weight

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2
WIDENS = True
SELECTS = True


def breadcrumbs(
    base: Tensor,
    *checkpoints: Tensor,
    weights: Strengths = [],  # noqa: B006 -- never written to
    density: Density = 0.9,
    gamma: Share = 0.01,
    vote: Vote = "none",
    scale: Weight = 1.0,
    normalize: bool = False,
) -> Tensor:
    """Return base + scale · Σ wᵢ · mᵢ (Mᵢ − base), mᵢ without the largest and the smallest differences.

    base: what all descend from, and what gives VAE and tokenizer; checkpoints: one tensor of each, of its shape. Their
    order decides nothing.
    weights: one for each checkpoint; empty: 1 each. gamma: the share of the largest that goes, as long as `density` is
    kept, then the smallest go; of equal ones the first count as larger; counted in each tensor by itself.
    vote: `sum` and `count` let the differences that are left elect a sign, as `ties` does. scale: of the result.
    normalize: divide by the sum of the weights (that agree).
    Source: Davari & Belilovsky 2023, https://arxiv.org/abs/2312.06795; `breadcrumbs` and `breadcrumbs_ties` of
    mergekit, whose default density of 1 drops nothing.
    """
    strengths = weights or [1.0] * len(checkpoints)
    masks = [kept(base, checkpoint, density, outliers=gamma) for checkpoint in checkpoints]

    def join(vectors: list[Tensor]) -> Tensor:
        if vote == "none":
            return weighed(vectors, coefficients(strengths, scale, normalize=normalize))
        return voted(vectors, strengths, strengths, vote, normalize=normalize) * scale

    return joined(join, base, checkpoints, masks)


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """What has weight 0 or equals the base is left out; without any the base passes through."""
    whole = parameters["density"] == 1 and parameters["vote"] == "none"
    return simplified(inputs, parameters, linear=whole)
