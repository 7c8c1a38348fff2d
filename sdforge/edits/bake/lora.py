"""LoRA in weights: strength · alpha / rank · up @ down (Hu et al. 2021, https://arxiv.org/abs/2106.09685, §4.1).

Its other forms (LoHa, LoKr, DoRA, OFT, …) are changes of a weight too: see `forms` for what each one does.
"""

from __future__ import annotations

from decimal import Decimal
from math import prod
from typing import TYPE_CHECKING, Any

from sdforge.artifact import Tensor
from sdforge.edits.bake.update import Place, Strengths, Update
from sdforge.errors import UsageError, nearest
from sdforge.families import Family
from sdforge.formats.lora import Change, Part, Shape, alpha_of, block_edge, change_of, has_alpha, parts_of
from sdforge.formula import Input
from sdforge.identity import decimal

if TYPE_CHECKING:
    import torch


def updates(lora: Input, family: Family, weights: dict[Place, Tensor]) -> dict[Place, list[Update]]:
    """Return the update of every weight that is baked at a strength other than 0. Every factor must find its layer."""
    strengths = Strengths(lora.use, family)
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in lora.tensors("lora").items():
        module, _, factor = name.rpartition(".")
        modules.setdefault(module, {})[factor] = tensor
    found: dict[Place, list[Update]] = {}
    for module, factors in modules.items():
        component, _, path = module.partition(".")
        _refuse_unknown(component, f"{path}.weight", module, strengths, family)
        shapes = {name: tensor.shape for name, tensor in factors.items()}
        for part in _parts(module, shapes):
            place = part.component, part.weight
            _refuse_unknown(*place, f"the bias of {module}", strengths, family)
            own = {name: shapes[name] for name in part.factors}
            change = _change(part, own, place, weights.get(place))
            if strength := strengths.at(*place):
                update = _update(part, change, module, strength, factors, lora.artifact.facts)
                found.setdefault(place, []).append(update)
    return found


def _refuse_unknown(component: str, name: str, what: str, strengths: Strengths, family: Family) -> None:
    if (component, name) not in strengths.blocks:
        guess = nearest(f"{component}.{name}", [f"{c}.{n}" for c, n in strengths.blocks])
        raise UsageError(f"it changes {what}, which {family.title} does not have", hint=f"nearest: {guess}")


def _parts(module: str, shapes: dict[str, Shape]) -> list[Part]:
    try:
        return parts_of(module, shapes)
    except ValueError:
        raise UsageError(f"it has {', '.join(sorted(shapes))} for {module}, which is no form known here") from None


def _fits(change: Change, shapes: dict[str, Shape], weight: Shape) -> bool:
    """Say whether factors that fit together fit a weight (or bias, of one dimension) too."""
    out, columns, inner = weight[0], weight[1] if len(weight) > 1 else 1, prod(weight[1:])
    per_row_or_column = [shapes[name] for name in ("dora_scale", "ia3") if name in shapes]
    return (
        change.out in (None, out)
        and change.inner in (None, inner)
        and all(shape in ((out, 1), (1, columns)) for shape in per_row_or_column)
        and ("lora_mid" in shapes or shapes.get("lora_down", weight)[1:] in (weight[1:], weight[1:2]))
        and shapes.get("a1", (columns,))[0] == columns
        and ("oft_r" not in shapes or inner % block_edge(shapes["oft_r"][1]) == 0)
    )


def _change(part: Part, shapes: dict[str, Shape], place: Place, weight: Tensor | None) -> Change:
    """Return what a part changes. Raises UsageError where it fits neither itself nor the weight."""
    factors = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    try:
        change = change_of(part, shapes)
    except ValueError:
        hint = "whatever wrote them was wrong, or the file is damaged: take another copy of it"
        raise UsageError(f"its factors {factors} for {'.'.join(place)} do not fit together", hint) from None
    if weight is not None and not _fits(change, shapes, weight.shape):
        raise UsageError(
            f"its factors {factors} do not fit {'.'.join(place)} {list(weight.shape)}",
            hint=_other_kernel(change, shapes, weight.shape) or "it was made for a checkpoint of other widths",
        )
    return change


def _other_kernel(change: Change, shapes: dict[str, Shape], weight: Shape) -> str:
    """Return the hint for factors that have the widths of a weight, and another kernel; or nothing."""
    theirs, own = (shapes.get("lora_down", ())[2:] or (1, 1)), (weight[2:] or (1, 1))
    if change.out not in (None, weight[0]) or theirs == own or change.inner != prod((*weight[1:2], *theirs)):
        return ""
    a, b = ("×".join(map(str, kernel)) for kernel in (theirs, own))
    return f"the LoRA is for a kernel of {a} there, and this layer has one of {b}: it was made for another network"


def _update(
    part: Part, change: Change, module: str, strength: float, factors: dict[str, Tensor], facts: dict[str, Any]
) -> Update:
    alpha = decimal(alpha_of(facts, module, change.rank)) if has_alpha(part.form, change) else Decimal(1)
    rank = change.rank or 1  # whole factors have none, and no scale
    tensors = tuple(factors[name] for name in part.factors)
    own: dict[str, Any] = {"form": part.form, "factors": list(part.factors)}
    if part.form == "oft":
        # of LyCORIS and kohya: the limit is per row
        return Update("lora", own | {"strength": strength, "limit": float(alpha * (change.out or 0))}, tensors)
    if part.form == "oft_input":
        return Update("lora", own | {"strength": strength, "neumann": facts.get("neumann", 0)}, tensors)
    if "dora_scale" in part.factors:
        return Update("lora", own | {"strength": strength, "scale": float(alpha / rank)}, tensors)
    scale = float(decimal(strength) * alpha / rank)
    if set(part.factors) == {"lora_down", "lora_up"}:
        return Update("lora", {"scale": scale}, (factors["lora_up"], factors["lora_down"]))
    return Update("lora", own | {"scale": scale}, tensors)


def joined(updates: list[Update]) -> list[Update]:
    """Return them as they are: products of factors are added."""
    return updates


def by_rows(parameters: dict[str, Any], weight: Shape, shapes: list[Shape]) -> list[bool] | None:
    """Say which factors are cut into rows along with the weight; None where a form needs all rows of it."""
    if "form" not in parameters:
        return [True, False]
    from sdforge.edits.bake.forms import rows_of

    return rows_of(parameters["form"], dict(zip(parameters["factors"], shapes, strict=True)), weight)


def delta(
    weight: torch.Tensor, parameters: dict[str, Any], tensors: list[torch.Tensor], *, exact: bool
) -> torch.Tensor:
    """Return scale · up @ down (up: (out, rank); down: (rank, …)), or what another form changes."""
    if "form" in parameters:
        from sdforge.edits.bake.forms import change

        return change(weight, parameters, tensors, exact=exact)
    from sdforge.exact import product

    up, down = tensors
    update = product(up, down.reshape(down.shape[0], -1), sliced=exact, like=weight)
    # a type it has already; but where the weight is noted for the compiled kernel, so is what follows
    return update.type_as(weight).mul_(float(parameters["scale"]))
