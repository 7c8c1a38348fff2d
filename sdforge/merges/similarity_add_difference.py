"""Add difference where two checkpoints differ, their mean where they are alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from sdforge.exact import line
from sdforge.settings import PerBlock, Share, Weight

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
ELEMENTWISE = True


def similarity_add_difference(
    a: Tensor, b: Tensor, base: Tensor, *, alpha: Annotated[Weight, PerBlock()] = 0.5, beta: Share = 1.0
) -> Tensor:
    """Return (1 − q) (a + α (b − base)) + q ((1 − α/2) a + α/2 b), q = β (1 + likeness) / 2, for every element.

    a: what is changed; b, base: whose difference is added; all of one shape. The likeness of two numbers is
    ab / max(|a|, |b|)², 1 for equal ones (and for two zeros), −1 for opposite ones.
    alpha: how much of the difference, twice the share of b. beta: how far likeness counts; at 0 it is add_difference.
    Source: `similarity_add_difference` of meh.
    """
    larger = a.abs().maximum(b.abs())
    safe = larger.where(larger != 0, 1.0)
    likeness = ((a / safe) * (b / safe)).where(larger != 0, 1.0)  # of the factors one is ±1: nothing underflows
    q = (likeness + 1) * 0.5 * beta
    return line(a + (b - base) * alpha, line(a, b, alpha * 0.5), q)


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """At alpha 0, and where all are equal, a passes through."""
    a, b, base = inputs
    return a if parameters["alpha"] == 0 or a == b == base else (inputs, parameters)
