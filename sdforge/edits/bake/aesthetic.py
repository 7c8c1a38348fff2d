"""A steered text encoder in weights: W + λ (W' − W); at λ = 1 it is W', to the bit (Gallego 2022, arXiv:2209.12330)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdforge.artifact import Tensor
from sdforge.edits.bake.update import Place, Strengths, Update
from sdforge.errors import UsageError
from sdforge.families import Family
from sdforge.formula import Input

if TYPE_CHECKING:
    import torch

KIND = "aesthetic"
ENCODER = "text_encoder"


def updates(aesthetic: Input, family: Family, weights: dict[Place, Tensor]) -> dict[Place, list[Update]]:
    """Return the change of every tensor of the text encoder. Raises UsageError for an encoder of other shapes."""
    strengths = Strengths(aesthetic.use, family)
    found: dict[Place, list[Update]] = {}
    for name, steered in aesthetic.tensors(KIND).items():
        component, _, path = name.partition(".")
        place = component, path
        if component != ENCODER:
            continue
        if place not in weights or weights[place].shape != steered.shape:
            raise UsageError(
                f"an aesthetic has {name} of {list(steered.shape)}, and the checkpoint "
                + (f"one of {list(weights[place].shape)}" if place in weights else "has none"),
                hint="steer the text encoder of the checkpoint into which it is baked, after words were inserted",
            )
        if strength := strengths.at(*place):
            found[place] = [Update(KIND, {"scale": strength}, (steered,), replaces=strength == 1)]
    return found


def by_rows(
    parameters: dict[str, Any],  # noqa: ARG001 -- one signature for all kinds
    weight: tuple[int, ...],  # noqa: ARG001
    shapes: list[tuple[int, ...]],  # noqa: ARG001
) -> list[bool]:
    """Say that each row of the change needs the same row of what was trained, and no other."""
    return [True]


def delta(
    weight: torch.Tensor,
    parameters: dict[str, Any],
    tensors: list[torch.Tensor],
    *,
    exact: bool,  # noqa: ARG001 -- nothing is summed
) -> torch.Tensor:
    """Return λ (W' − W) in fp64."""
    (steered,) = tensors
    return float(parameters["scale"]) * (steered.double() - weight)
