"""A checkpoint in another type of numbers, or its parts in several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import Field

from sdforge.families import Family
from sdforge.formula import CAST_VERSION, Input, Plan, cast, passes, target_dtype
from sdforge.settings import Dtype, Reference, Since, Takes, Target

if TYPE_CHECKING:
    import torch

VERSION = CAST_VERSION
MAKES = "checkpoint"


@final
class Cast(Target):
    """Round every number to the nearest of another type, ties to even; what does not fit is an error."""

    checkpoint: Annotated[Reference, Takes("checkpoint", ("unet", "text_encoder", "image_", "vae"), ())]
    dtype: Literal["fp16", "bf16", "fp32"] = Field(description="type of the result's numbers")
    unet: Annotated[Dtype, Since(2, "")] = Field("", description="of the U-Net's; empty: as `dtype` says")
    text_encoder: Annotated[Dtype, Since(2, "")] = Field("", description="of all text encoders' numbers")
    vae: Annotated[Dtype, Since(2, "")] = Field("", description="of the VAE's numbers")

    def of(self, component: str) -> str:
        """Return the type of a component's numbers."""
        stated = {"unet": self.unet, "vae": self.vae}.get(component, "")
        return (self.text_encoder if component.startswith("text_encoder") else stated) or self.dtype


TABLE = Cast


def plan(table: Cast, inputs: dict[str, list[Input]], family: Family) -> Plan:
    (checkpoint,) = inputs["checkpoint"]
    result = Plan()
    for component in family.networks:
        rows = []
        for tensor in checkpoint.tensors(component).values():
            target = target_dtype(table.of(component), tensor)
            rows.append(passes(tensor) if target == tensor.dtype else cast(tensor.name, tensor, target))
        if rows:
            result.components[component] = rows
    return result


def compute(parameters: dict[str, Any], tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:  # noqa: ARG001
    """Return the tensor as it is: the rounding is the engine's."""
    return tensors[0]
