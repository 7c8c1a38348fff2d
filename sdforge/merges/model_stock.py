"""Model stock: towards the mean of fine-tuned checkpoints, as far as they agree."""

from __future__ import annotations

from decimal import Decimal
from itertools import combinations
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from sdforge.exact import column_dots, gram, in_runs, root
from sdforge.merges._task_vectors import joined, total
from sdforge.settings import Since

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2
WIDENS = True


Several = Annotated["Tensor", Field(min_length=2)]
SMALLEST = 1e-6  # of 1 + (N − 1) c, which is divided by


def model_stock(
    base: Tensor, *checkpoints: Several, filter_wise: Annotated[bool, Since(2, neutral=False)] = False
) -> Tensor:
    """Return base + t · mean of dᵢ, dᵢ = Mᵢ − base, t = N c / (1 + (N − 1) c) kept in 0 … 1.

    base: what all descend from, and what gives VAE and tokenizer; checkpoints: one tensor of each, of its shape, two
    at least. Their order decides nothing. c is the mean cosine of all pairs dᵢ, dⱼ, each tensor read as one vector;
    that with a dᵢ of 0 is 0.
    filter_wise: each filter (what the first dimension counts) is a vector with c and t of its own.
    Source: Jang et al. 2024, https://arxiv.org/abs/2403.19522, eq. 7; `model_stock` of mergekit.
    """
    if filter_wise and base.dim() > 1:
        matrices = [tensor.reshape(base.shape[0], prod(base.shape[1:])) for tensor in (base, *checkpoints)]
        return in_runs(_filters, *matrices).reshape(base.shape)
    products = gram(lambda own, *parts: [part - own for part in parts], base, *checkpoints)
    lengths = [row[i].sqrt() for i, row in enumerate(products)]
    pairs = list(combinations(range(len(lengths)), 2))
    cosines = [products[j][i] / (lengths[i] * lengths[j] or 1) for i, j in pairs]
    count, mean = len(checkpoints), sum(cosines, Decimal(0)) / len(pairs)
    below = 1 + (count - 1) * mean
    t = min(max(count * mean / below, Decimal(0)), Decimal(1)) if abs(below) >= SMALLEST else Decimal(0)
    share = float(t / count)
    return joined(lambda vectors: total(vectors) * share, base, checkpoints)


def _filters(base: Tensor, *checkpoints: Tensor) -> Tensor:
    """Return the model stock of each row by itself."""
    vectors = [checkpoint - base for checkpoint in checkpoints]
    lengths = [root(column_dots(vector.T, vector.T)) for vector in vectors]
    pairs = list(combinations(range(len(vectors)), 2))
    products = [lengths[i] * lengths[j] for i, j in pairs]
    below = [product.where(product > 0, 1.0) for product in products]
    cosines = [column_dots(vectors[i].T, vectors[j].T) / product for (i, j), product in zip(pairs, below, strict=True)]
    count, mean = len(vectors), total(cosines) / len(pairs)
    apart = 1 + (count - 1) * mean
    there = apart.abs() >= SMALLEST
    t = (count * mean / apart.where(there, 1.0) * there).clamp(0, 1)
    return base + total(vectors) * (t / count).to(base.dtype)[:, None]


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """Equal checkpoints agree in everything and pass through; the others are sorted."""
    base, *others = inputs
    return others[0] if all(each == others[0] for each in others) else ([base, *sorted(others)], parameters)
