"""Artifacts become part of a checkpoint's weights: all at once, one rounding, in no order.

What a kind of artifact changes, and how, is said by the module of that kind beside this one: see `update.Kind`.
"""

from __future__ import annotations

import importlib
from collections.abc import Container, Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, final

from pydantic import Field

from sdforge.artifact import Artifact, Tensor
from sdforge.edits.bake.custom import words as custom_words
from sdforge.edits.bake.update import Kind, Place, Strength, UNetStrength, Update
from sdforge.edits.insert import ROWS, with_words
from sdforge.errors import UsageError, counted
from sdforge.families import Family
from sdforge.formats.hypernetwork import nonlinear
from sdforge.formula import Input, Made, Plan, cast, computed, passes, target_dtype
from sdforge.settings import Reference, Takes, Target

if TYPE_CHECKING:
    import torch

VERSION = 1
MAKES = "checkpoint"
IN_FP64 = True  # so is everything computed

# role → the module of its kind
KINDS = {
    "loras": "lora",
    "custom": "custom",
    "hypernetworks": "hypernetwork",
    "image_embeddings": "image_embedding",
    "aesthetics": "aesthetic",
}


@final
class Bake(Target):
    """W + Σ changeᵢ(W), every change taken against the same W and rounded once.

    A LoRA's change is strength · alpha / rank · up @ down. What replaces W (DoRA, rotations) is gone towards by the
    share that strength says, so that strength 0 is W. Every part of every artifact must find its layer. An image
    embedding takes the place of whatever picture is shown, an aesthetic that of the text encoder, as far as strength.
    Custom Diffusion's change is strength · (its matrix − W), and its word is appended as `insert` does; a linear
    hypernetwork's is strength · W A, and several are applied one after the other.
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
    image_embeddings: Annotated[dict[Reference, Strength], Takes("image_embedding")] = Field(
        {}, description="what is drawn from, whatever picture is shown"
    )
    aesthetics: Annotated[dict[Reference, Strength], Takes("aesthetic")] = Field(
        {}, description="towards what the text encoder is steered"
    )


TABLE = Bake


def advise(table: Bake, inputs: dict[str, list[Artifact | None]]) -> list[tuple[str, str, str, str, bool]]:
    """Refuse what can never become weights before it is trained, and say what an aesthetic does."""
    found = _aesthetics(table, inputs)
    for name, artifact in zip(table.hypernetworks, inputs.get("hypernetworks", []), strict=True):
        if artifact is not None and (reason := nonlinear(artifact.facts)):
            sentence = f"`{name}` has {reason}, and only linear hypernetworks become weights"
            found.append((f"hypernetworks.{name}", "linear", sentence, f'[preset] sidecars = ["{name}"]', False))
    return found


def _aesthetics(table: Bake, inputs: dict[str, list[Artifact | None]]) -> list[tuple[str, str, str, str, bool]]:
    """Say for what an aesthetic is right, and by how much it shifts what it was not made for."""
    found = []
    for name, aesthetic in zip(table.aesthetics, inputs.get("aesthetics", []), strict=True):
        if aesthetic is None or "prompts" not in aesthetic.facts:
            continue
        facts: dict[str, Any] = aesthetic.facts
        prompts, shift = facts["prompts"], facts.get("shift", 0.0)
        what = f"the prompt {prompts[0]!r}" if len(prompts) == 1 else f"{len(prompts)} prompts together"
        sentence = f"`{name}` was steered by {what}; baked, it shifts every prompt, the empty one by {shift:.0%}"
        hint = f'[preset] sidecars = ["{name}"] steers each prompt by itself, and leaves the empty one'
        found.append((f"aesthetics.{name}", "aesthetic", sentence, hint, True))
    return found


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
            with given.named():
                own = kind_of(kind).updates(given, family, weights)
                _refuse_lost(own, weights)
            for place, found in own.items():
                updates.setdefault(place, []).extend(found)
    words = [word for given in inputs.get("custom", []) for word in custom_words(given)]
    words.sort(key=lambda each: each.word)
    rows, facts = with_words(checkpoint, words, table.dtype) if words else ({}, {})
    if taken := [component for component in rows if (component, ROWS) in updates]:
        raise UsageError(
            f"words are appended to the {taken[0].replace('_', ' ')}, which something else replaces",
            hint="bake one after the other, in two targets",
        )
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


def _refuse_lost(updates: Iterable[Place], weights: Container[Place]) -> None:
    if lost := sorted(".".join(place) for place in updates if place not in weights):
        raise UsageError(f"it changes {counted(len(lost), 'layer')} that the checkpoint does not have: {lost[0]}")


def _baked(tensor: Tensor, updates: list[Update], dtype: str) -> Made:
    target = target_dtype(dtype, tensor)
    if not updates or (len(updates) == 1 and updates[0].replaces):
        through = updates[0].tensors[0]._replace(name=tensor.name) if updates else tensor
        return passes(through) if target == through.dtype else cast(tensor.name, through, target)
    ordered = list(_joined(sorted(updates, key=lambda update: update.order)))
    inputs = [tensor, *(each for update in ordered for each in update.tensors)]
    return computed("bake", VERSION, tensor.name, target, tensor.shape, inputs, _parameters(ordered))


def _joined(updates: list[Update]) -> Iterator[Update]:
    """Yield updates as they are added: those of a kind that do not add up are one (its module says how)."""
    for kind, same in groupby(updates, lambda update: update.kind):
        found, join = list(same), getattr(kind_of(kind), "joined", None)
        yield from join(found) if join else found


def _parameters(updates: list[Update]) -> dict[str, Any]:
    if all(update.kind == "lora" and set(update.parameters) == {"scale"} for update in updates):
        return {"scales": [update.parameters["scale"] for update in updates]}
    return {"updates": [[u.kind, len(u.tensors), u.parameters] for u in updates]}


def _updates(parameters: dict[str, Any]) -> list[list[Any]]:
    """Return what `_parameters` was given: kind, number of tensors and parameters of every update."""
    found: list[list[Any]] = parameters.get("updates") or [["lora", 2, {"scale": s}] for s in parameters["scales"]]
    return found


def by_rows(parameters: dict[str, Any], shapes: list[tuple[int, ...]]) -> list[bool] | None:
    """Say which tensors are cut into rows along with the weight (the others every row needs); None: it needs all rows.

    shapes: of the weight, and of what it is changed from.
    """
    weight, *rest = shapes
    along = [True]
    for kind, count, own in _updates(parameters):
        cut = getattr(kind_of(kind), "by_rows", None)
        found = cut(own, weight, rest[:count]) if cut else None
        if found is None:
            return None
        along += found
        rest = rest[count:]
    return along


def compute(parameters: dict[str, Any], tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return W + Σ changeᵢ(W) in fp64."""
    weight, *rest = (tensor.double() for tensor in tensors)
    exact, total = dtype.itemsize > 2, None
    for kind, count, own in _updates(parameters):
        change = kind_of(kind).delta(weight, own, rest[:count], exact=exact)
        total = change.add_(0.0) if total is None else total.add_(change)  # 0 + −0 is 0, whatever the first change is
        rest = rest[count:]
    assert total is not None
    return total.type_as(weight).add_(weight)
