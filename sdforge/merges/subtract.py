"""What one checkpoint has learned beyond another one: a delta, to be added to a third."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from sdforge.settings import PerBlock, Weight

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
ELEMENTWISE = True
KEEPS_NAN = True
MAKES = "delta"


def subtract(a: Tensor, b: Tensor, *, weight: Annotated[Weight, PerBlock()] = 1.0) -> Tensor:
    """Return weight (a − b). It is no checkpoint: only `add` takes it, and nothing exports it.

    a, b: of one shape. In fp16 the difference is rounded once more than `add_difference` rounds it; `dtype = "fp32"`
    keeps it whole.
    Source: task vectors, Ilharco et al. 2022, https://arxiv.org/abs/2212.04089; `subtract` of sd-mecha.
    """
    return (a - b) * weight


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """Nothing passes through: even a difference of 0 is other numbers than those it is made of."""
    return inputs, parameters
