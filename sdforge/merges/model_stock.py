"""Model stock: towards the mean of fine-tuned checkpoints, as far as they agree."""

from __future__ import annotations

from decimal import Decimal
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from sdforge.exact import dot

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1


Several = Annotated["Tensor", Field(min_length=2)]
SMALLEST = Decimal("1e-6")  # what is divided by


def model_stock(base: Tensor, *checkpoints: Several) -> Tensor:
    """Return base + t · mean of dᵢ, dᵢ = Mᵢ − base, t = N c / (1 + (N − 1) c) kept in 0 … 1.

    base: what all descend from, and what gives VAE and tokenizer; checkpoints: one tensor of each, of its shape, two
    at least. Their order decides nothing. c is the mean cosine of all pairs dᵢ, dⱼ, each tensor read as one vector.
    Source: Jang et al. 2024, https://arxiv.org/abs/2403.19522, eq. 7; `model_stock` of mergekit.
    """
    vectors = [each - base for each in checkpoints]
    lengths = [dot(each, each).sqrt() for each in vectors]
    pairs = list(combinations(range(len(vectors)), 2))
    cosines = [dot(vectors[i], vectors[j]) / max(lengths[i] * lengths[j], SMALLEST) for i, j in pairs]
    count, mean = len(vectors), sum(cosines, Decimal(0)) / len(pairs)
    below = 1 + (count - 1) * mean
    t = min(max(count * mean / below, Decimal(0)), Decimal(1)) if abs(below) >= SMALLEST else Decimal(0)
    total = vectors[0]
    for vector in vectors[1:]:
        total = total + vector
    return base + total * float(t / count)


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """Equal checkpoints agree in everything and pass through; the others are sorted."""
    base, *others = inputs
    return others[0] if all(each == others[0] for each in others) else ([base, *sorted(others)], parameters)
