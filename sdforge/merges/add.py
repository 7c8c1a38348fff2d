"""A checkpoint plus a delta that `subtract` made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from sdforge.settings import PerBlock, Takes, Weight

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
ELEMENTWISE = True


def add(a: Tensor, delta: Annotated[Tensor, Takes("delta")], *, weight: Annotated[Weight, PerBlock()] = 1.0) -> Tensor:
    """Return a + weight · delta.

    a: what is changed; delta: what is added, of one shape. weight: how much of it, negative to take it away.
    Source: Ilharco et al. 2022, https://arxiv.org/abs/2212.04089; "ModelAdd" of ComfyUI.
    """
    return a + delta * weight


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """At weight 0 the checkpoint passes through."""
    return inputs[0] if parameters["weight"] == 0 else (inputs, parameters)
