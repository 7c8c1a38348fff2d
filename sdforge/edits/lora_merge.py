"""Several LoRAs in one: their factors side by side, exactly what all of them do together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, final

from pydantic import Field

from sdforge.artifact import Tensor
from sdforge.dtypes import SAFETENSORS
from sdforge.edits.bake.lora import updates
from sdforge.edits.bake.update import Place, Strength, Update
from sdforge.errors import UsageError
from sdforge.families import Family
from sdforge.formula import Input, Made, Plan, cast, computed, passes
from sdforge.settings import Reference, Takes, Target

if TYPE_CHECKING:
    import torch

VERSION = 1
MAKES = "lora"

WHOLE = ("diff", "diff_b", "w_norm", "b_norm")  # differences that are added as they are
REDUCIBLE = ("loha", "lokr", "lora")  # what `resize` makes plain factors of; with a core, LoRA too
ROWS, COLUMNS, SUM = "rows", "columns", "sum"


@final
class LoraMerge(Target):
    """Factors side by side, down = [down₁; down₂; …] and up = [s₁ up₁, s₂ up₂, …], so that up @ down = Σ sᵢ upᵢ downᵢ.

    Here s = strength · alpha / rank. Ranks add up, alpha is the rank, strengths are stated as for `bake`, and baking
    the result is baking all of them, but for one rounding of s·up. For fewer ranks, `resize` the result: that is a
    merge by singular value decomposition.
    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, §4.1; `merge_lora --concat` of kohya's scripts.
    """

    loras: Annotated[dict[Reference, Strength], Field(min_length=1), Takes("lora")]


TABLE = LoraMerge


def plan(table: LoraMerge, inputs: dict[str, list[Input]], family: Family) -> Plan:
    """Return all factors. Raises UsageError for forms that cannot stand side by side, and where nothing is left."""
    loras = sorted(inputs["loras"], key=lambda each: (each.artifact.identity, repr(sorted(each.use.items()))))
    places: dict[Place, list[tuple[Input, Update]]] = {}
    for lora in loras:
        with lora.named():
            own = updates(lora, family, {})
        for place, found in own.items():
            places.setdefault(place, []).extend((lora, update) for update in found)
    if not places:
        raise UsageError("nothing is left of the LoRAs at these strengths", hint="a strength other than 0")
    rows = [row for place, found in sorted(places.items()) for row in _joined(place, found, table.dtype)]
    return Plan({"lora": rows}, {name: None for lora in loras for name in lora.artifact.facts})


def _joined(place: Place, found: list[tuple[Input, Update]], dtype: str) -> list[Made]:
    """Return what becomes of the updates of one weight."""
    component, weight = place
    module = f"{component}.{weight.rpartition('.')[0]}"
    loras, updates = zip(*found, strict=True)
    forms = {update.parameters.get("form", "") for update in updates}
    scales = [float(update.parameters.get("scale", 0)) for update in updates]
    if forms == {""}:
        ups, downs = zip(*(update.tensors for update in updates), strict=True)
        _refuse_others(module, loras, downs, slice(1, None))
        _refuse_others(module, loras, ups, slice(0, 1))
        rank = sum(down.shape[0] for down in downs)
        return [
            _one(f"{module}.lora_down", downs, (rank, *downs[0].shape[1:]), dtype, ROWS, [1.0] * len(downs)),
            _one(f"{module}.lora_up", ups, (ups[0].shape[0], rank), dtype, COLUMNS, scales),
        ]
    form = forms.pop()
    if not forms and form in WHOLE:
        wholes = tuple(update.tensors[0] for update in updates)
        _refuse_others(module, loras, wholes, slice(None))
        return [_one(f"{module}.{form}", wholes, wholes[0].shape, dtype, SUM, scales)]
    other = min({form, *forms} - {""})
    relative = any("strength" in update.parameters for update in updates) or other not in (*REDUCIBLE, *WHOLE)
    with next(lora for lora, update in found if update.parameters.get("form") == other).named():
        raise UsageError(
            f"it changes {module} as {'more than a lora' if other == 'lora' else other}, "
            "which has no factors to put beside others",
            hint="bake it: it says nothing without the weight" if relative else "`resize` makes plain LoRA of it",
        )


def _refuse_others(module: str, loras: tuple[Input, ...], tensors: tuple[Tensor, ...], which: slice) -> None:
    for lora, other in zip(loras, tensors, strict=True):
        if other.shape[which] != tensors[0].shape[which]:
            with lora.named():
                raise UsageError(
                    f"it has {list(other.shape)} for {module}, and `{loras[0].name}` {list(tensors[0].shape)}",
                    hint="they were made for checkpoints of other widths",
                )


def _one(
    name: str, tensors: tuple[Tensor, ...], shape: tuple[int, ...], dtype: str, join: str, scales: list[float]
) -> Made:
    types = {tensor.dtype for tensor in tensors}
    target = SAFETENSORS[dtype] if dtype else types.pop() if len(types) == 1 else "F32"
    if len(tensors) == 1 and scales == [1.0]:
        (only,) = tensors
        through = only._replace(name=name)
        return passes(through) if target == only.dtype else cast(name, through, target)
    return computed("lora_merge", VERSION, name, target, shape, list(tensors), {"join": join, "scales": scales})


def by_rows(parameters: dict[str, Any], shapes: list[tuple[int, ...]]) -> list[bool] | None:
    """Say that each row of what is side by side or added needs the same row of all tensors; None: they are stacked."""
    return None if parameters["join"] == ROWS else [True] * len(shapes)


def compute(parameters: dict[str, Any], tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:  # noqa: ARG001
    """Return the tensors, each times its scale, above one another, side by side, or added; in fp64."""
    import torch

    scaled = [tensor.double() * scale for tensor, scale in zip(tensors, parameters["scales"], strict=True)]
    if parameters["join"] == SUM:
        total: torch.Tensor = sum(scaled[1:], scaled[0])
        return total
    return torch.cat(scaled, dim=int(parameters["join"] == COLUMNS))
