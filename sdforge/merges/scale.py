"""A checkpoint times a number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from sdforge.settings import PerBlock, Weight

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
ELEMENTWISE = True
KEEPS_NAN = True


def scale(a: Tensor, *, weight: Annotated[Weight, PerBlock()]) -> Tensor:
    """Return weight · a, in every tensor that a block does not except: norms and output layers are no exception.

    Source: `scale` of sd-mecha, `passthrough` of mergekit; "self" of SuperMerger skips some layers and takes 0 for 1.
    """
    return a * weight


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """Times 1 it passes through."""
    return inputs[0] if parameters["weight"] == 1 else (inputs, parameters)
