"""A checkpoint in another type of numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import Field

from sdforge.families import Family
from sdforge.formula import CAST_VERSION, Input, Plan, cast, passes, target_dtype
from sdforge.settings import Reference, Takes, Target

if TYPE_CHECKING:
    import torch

VERSION = CAST_VERSION
ELEMENTWISE = True
MAKES = "checkpoint"


@final
class Cast(Target):
    """Round every number to the nearest of another type, ties to even; what does not fit is an error."""

    checkpoint: Annotated[Reference, Takes("checkpoint", ("unet", "text_encoder", "image_", "vae"), ())]
    dtype: Literal["fp16", "bf16", "fp32"] = Field(description="type of the result's numbers")


TABLE = Cast


def plan(table: Cast, inputs: dict[str, list[Input]], family: Family) -> Plan:
    (checkpoint,) = inputs["checkpoint"]
    result = Plan()
    for component in family.networks:
        rows = []
        for tensor in checkpoint.tensors(component).values():
            target = target_dtype(table.dtype, tensor)
            rows.append(passes(tensor) if target == tensor.dtype else cast(tensor.name, tensor, target))
        if rows:
            result.components[component] = rows
    return result


def compute(parameters: dict[str, Any], tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:  # noqa: ARG001
    """Return the tensor as it is: the rounding is the engine's."""
    return tensors[0]
