"""A base plus what several checkpoints learned since it, each times its weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdforge.merges._task_vectors import Strengths, coefficients, joined, simplified, weighed
from sdforge.settings import Weight

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
ELEMENTWISE = True


def task_arithmetic(
    base: Tensor,
    *checkpoints: Tensor,
    weights: Strengths = [],  # noqa: B006 -- never written to
    scale: Weight = 1.0,
    normalize: bool = False,
) -> Tensor:
    """Return base + scale · Σ wᵢ (Mᵢ − base), with `normalize` divided by Σ wᵢ.

    base: what all descend from, and what gives VAE and tokenizer; checkpoints: one tensor of each, of its shape. Their
    order decides nothing.
    weights: one for each checkpoint, usually 0 … 1, negative to unlearn; empty: 1 each. scale: of all, the paper's λ.
    Source: Ilharco et al. 2022, https://arxiv.org/abs/2212.04089; `task_arithmetic` of mergekit.
    """
    factors = coefficients(weights or [1.0] * len(checkpoints), scale, normalize=normalize)
    return joined(lambda vectors: weighed(vectors, factors), base, checkpoints)


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """What has weight 0 or equals the base is left out; without any the base passes, a single one of weight 1 does."""
    return simplified(inputs, parameters, linear=True)
