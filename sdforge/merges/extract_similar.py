"""What two checkpoints have learned alike, or what they have not, added to their ancestor."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from sdforge.exact import column_dots, in_runs, line, root
from sdforge.settings import PerBlock, Share

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
WIDENS = True


def extract_similar(
    base: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    alpha: Annotated[Share, PerBlock()] = 0.5,
    beta: Share = 0.0,
    gamma: Annotated[int, Field(ge=0, le=64)] = 1,
) -> Tensor:
    """Return base + ((1 − α) x + α y) ((1 − β) d + β (1 − d)), x = b − base, y = c − base, d = ((1 + cos) / 2)^γ.

    base: the ancestor, which gives VAE and tokenizer; b, c: what descends from it, of its shape. cos is that of each
    row of x and y (over the last dimension), 0 with a row of zeros.
    alpha: the share of c. beta: 0 what is alike, 1 what is not. gamma: how sharply it is told apart.
    Source: "extract" of SuperMerger, whose γ may be a fraction.
    """

    def rows(origin: Tensor, b: Tensor, c: Tensor) -> Tensor:
        x, y = b - origin, c - origin
        lengths = root(column_dots(x.T, x.T)) * root(column_dots(y.T, y.T))
        cosines = column_dots(x.T, y.T) / lengths.where(lengths != 0, 1.0)
        likeness, alike = (cosines.clamp(-1, 1) + 1) * 0.5, cosines.new_ones(cosines.shape)
        for _ in range(gamma):
            alike = alike * likeness
        kept = line(alike, 1 - alike, beta).to(origin.dtype)
        return origin + line(x, y, alpha) * kept[:, None]

    width = base.shape[-1] if base.dim() else 1
    matrices = [tensor.reshape(prod(base.shape[:-1]), width) for tensor in (base, b, c)]
    return in_runs(rows, *matrices).reshape(base.shape)


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """Where nothing has been learned the ancestor passes through."""
    base, b, c = inputs
    return base if base == b == c else (inputs, parameters)
