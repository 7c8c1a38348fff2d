"""A checkpoint plus what another one learned since their common ancestor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from sdforge.settings import PerBlock, Weight

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
ELEMENTWISE = True
KEEPS_NAN = True


def add_difference(a: Tensor, b: Tensor, base: Tensor, *, weight: Annotated[Weight, PerBlock()] = 1.0) -> Tensor:
    """Return a + weight (b − base).

    a: what is changed; b, base: whose difference is added; all of one shape.
    weight: how much of the difference, usually 0 … 1.
    Source: "Add difference" of A1111's merger; as task vectors, Ilharco et al. 2022, https://arxiv.org/abs/2212.04089
    """
    return (b - base).mul_(weight).add_(a)


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """Weight 0, or b equal to base: a passes through. Weight 1 and a equal to base: b does."""
    a, b, base = inputs
    if parameters["weight"] == 0 or b == base:
        return a
    if parameters["weight"] == 1 and a == base:
        return b
    return inputs, parameters
