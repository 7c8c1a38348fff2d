"""Artifacts become part of a checkpoint's weights: all at once, one rounding, in no order.

What a kind of artifact changes, and how, is said by the module of that kind beside this one: see `update.Kind`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Annotated, Any, final

from pydantic import Field

from sdforge.artifact import Tensor
from sdforge.edits.bake.update import Kind, Place, Strength, Update
from sdforge.errors import UsageError
from sdforge.families import Family
from sdforge.formula import Input, Made, Plan, cast, computed, passes, target_dtype
from sdforge.settings import Reference, Takes, Target

if TYPE_CHECKING:
    import torch

VERSION = 1
MAKES = "checkpoint"

KINDS = {"loras": "lora"}  # role → the module of its kind


@final
class Bake(Target):
    """W + Σ changeᵢ(W), every change taken against the same W and rounded once.

    A LoRA's change is strength · alpha / rank · up @ down. What replaces W (DoRA, rotations) is gone towards by the
    share that strength says, so that strength 0 is W. Every part of every artifact must find its layer.
    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, §4.1
    """

    checkpoint: Annotated[Reference, Takes("checkpoint", ("unet", "text_encoder"), ())]
    loras: Annotated[dict[Reference, Strength], Takes("lora")] = Field({}, description="LoRAs and how much of each")


TABLE = Bake


def kind_of(name: str) -> Kind:
    """Return the module of a kind."""
    found: Kind = importlib.import_module(f"sdforge.edits.bake.{name}")
    return found


def plan(table: Bake, inputs: dict[str, list[Input]], family: Family) -> Plan:
    """Return what every tensor is made of. Raises UsageError for parts that fit no layer."""
    (checkpoint,) = inputs["checkpoint"]
    if not any(inputs.get(role) for role in KINDS):
        raise UsageError("there is nothing to bake", hint=f"name something: {', '.join(f'{r}.NAME' for r in KINDS)}")
    tables = {c: checkpoint.tensors(c) for c in family.networks if c in checkpoint.artifact.components}
    weights = {(component, name): tensor for component, table in tables.items() for name, tensor in table.items()}
    updates: dict[Place, list[Update]] = {}
    for role, kind in KINDS.items():
        for given in inputs.get(role, []):
            for place, found in kind_of(kind).updates(given, family, weights).items():
                updates.setdefault(place, []).extend(found)
    if lost := sorted(".".join(place) for place in updates if place not in weights):
        raise UsageError(f"a LoRA has factors for {len(lost)} layers that the checkpoint does not have: {lost[0]}")
    result = Plan()
    for component, tensors in tables.items():
        touched = any(place[0] == component for place in updates)
        if touched or (table.dtype and component != "vae"):
            result.components[component] = [
                _baked(tensor, updates.get((component, tensor.name), []), table.dtype) for tensor in tensors.values()
            ]
    return result


def _baked(tensor: Tensor, updates: list[Update], dtype: str) -> Made:
    target = target_dtype(dtype, tensor)
    if not updates:
        return passes(tensor) if target == tensor.dtype else cast(tensor.name, tensor, target)
    ordered = sorted(updates, key=lambda update: update.order)
    inputs = [tensor, *(each for update in ordered for each in update.tensors)]
    return computed("bake", VERSION, tensor.name, target, tensor.shape, inputs, _parameters(ordered))


def _parameters(updates: list[Update]) -> dict[str, Any]:
    if all(update.kind == "lora" and set(update.parameters) == {"scale"} for update in updates):
        return {"scales": [update.parameters["scale"] for update in updates]}
    return {"updates": [[u.kind, len(u.tensors), u.parameters] for u in updates]}


def compute(parameters: dict[str, Any], tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return W + Σ changeᵢ(W) in fp64."""
    weight, *rest = tensors
    exact, original = dtype.itemsize > 2, weight.double()
    total = original.new_zeros(original.shape)
    for kind, count, own in parameters.get("updates") or [["lora", 2, {"scale": s}] for s in parameters["scales"]]:
        total = total + kind_of(kind).delta(original, own, rest[:count], exact=exact)
        rest = rest[count:]
    return original + total
