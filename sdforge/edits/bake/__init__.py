"""Artifacts become part of a checkpoint's weights: all at once, one rounding, in no order.

What a kind of artifact changes, and how, is said by the module of that kind beside this one: see `update.Kind`.
"""

from __future__ import annotations

import importlib
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, final

from pydantic import Field

from sdforge.artifact import Artifact, Tensor
from sdforge.edits.bake.custom import words as custom_words
from sdforge.edits.bake.update import Kind, Place, Strength, UNetStrength, Update
from sdforge.edits.insert import ROWS, with_words
from sdforge.errors import UsageError
from sdforge.families import Family
from sdforge.formats.hypernetwork import nonlinear
from sdforge.formula import Input, Made, Plan, cast, computed, passes, target_dtype
from sdforge.settings import Reference, Takes, Target

if TYPE_CHECKING:
    import torch

VERSION = 1
MAKES = "checkpoint"

# role → the module of its kind, which is also what the artifacts in it are
KINDS = {"loras": "lora", "custom": "custom", "hypernetworks": "hypernetwork"}


@final
class Bake(Target):
    """W + Σ changeᵢ(W), every change taken against the same W and rounded once.

    A LoRA's change is strength · alpha / rank · up @ down. Custom Diffusion's is strength · (its matrix − W), and its
    word is appended as `insert` does. A linear hypernetwork's is strength · W A. Every part must find its layer.
    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, §4.1; Kumari et al. 2022, https://arxiv.org/abs/2212.04488
    """

    checkpoint: Annotated[Reference, Takes("checkpoint", ("unet", "text_encoder"), ())]
    loras: Annotated[dict[Reference, Strength], Takes("lora")] = Field({}, description="LoRAs and how much of each")
    custom: Annotated[
        dict[Reference, UNetStrength],
        # where words are appended, it matters which ones there are
        Takes("custom", widens={"checkpoint": (("tokenizer",), ("tokens",))}),
    ] = Field({}, description="what Custom Diffusion made, and how much of each")
    hypernetworks: Annotated[dict[Reference, UNetStrength], Takes("hypernetwork")] = Field(
        {}, description="linear hypernetworks and how much of each"
    )


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
        raise UsageError(f"what is baked changes {len(lost)} layers that the checkpoint does not have: {lost[0]}")
    words = [word for given in inputs.get("custom", []) for word in custom_words(given)]
    words.sort(key=lambda each: each.word)
    rows, facts = with_words(checkpoint, words, table.dtype) if words else ({}, {})
    result = Plan(facts=facts)
    for component, tensors in tables.items():
        touched = component in rows or any(place[0] == component for place in updates)
        if touched or (table.dtype and component not in family.kept):
            result.components[component] = [
                rows[component]
                if component in rows and tensor.name == ROWS
                else _baked(tensor, updates.get((component, tensor.name), []), table.dtype)
                for tensor in tensors.values()
            ]
    return result


def advise(table: Bake, inputs: dict[str, list[Artifact | None]]) -> list[tuple[str, str, str, str, bool]]:
    """Refuse what can never become weights before it is trained."""
    found = []
    for name, artifact in zip(table.hypernetworks, inputs.get("hypernetworks", []), strict=True):
        if artifact is not None and (reason := nonlinear(artifact.facts)):
            sentence = f"`{name}` has {reason}, and only linear hypernetworks become weights"
            found.append((f"hypernetworks.{name}", "linear", sentence, f'[preset] sidecars = ["{name}"]', False))
    return found


def _baked(tensor: Tensor, updates: list[Update], dtype: str) -> Made:
    target = target_dtype(dtype, tensor)
    if not updates:
        return passes(tensor) if target == tensor.dtype else cast(tensor.name, tensor, target)
    ordered = [
        update
        for kind, same in groupby(sorted(updates, key=lambda update: update.order), lambda update: update.kind)
        for update in kind_of(kind).joined(list(same))
    ]
    if len(ordered) == 1 and (whole := ordered[0].becomes):
        return passes(whole._replace(name=tensor.name)) if target == whole.dtype else cast(tensor.name, whole, target)
    inputs = [tensor, *(each for update in ordered for each in update.tensors)]
    return computed("bake", VERSION, tensor.name, target, tensor.shape, inputs, _parameters(ordered))


def _parameters(updates: list[Update]) -> dict[str, Any]:
    if all(update.kind == "lora" for update in updates):
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
