"""LoRA in weights: strength · alpha / rank · up @ down (Hu et al. 2021, https://arxiv.org/abs/2106.09685, §4.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdforge.artifact import Tensor
from sdforge.edits.bake.update import Place, Strengths, Update
from sdforge.errors import UsageError, nearest
from sdforge.families import Family
from sdforge.formats.lora import alpha_of
from sdforge.formula import Input
from sdforge.identity import decimal

if TYPE_CHECKING:
    import torch


def updates(lora: Input, family: Family, weights: dict[Place, Tensor]) -> dict[Place, list[Update]]:
    """Return the update of every weight that is baked at a strength other than 0. Every factor must find its layer."""
    strengths = Strengths(lora.use, family)
    factors = lora.tensors("lora")
    found: dict[Place, list[Update]] = {}
    for name, down in factors.items():
        module, _, factor = name.rpartition(".")
        if factor != "lora_down":
            continue
        component, _, path = module.partition(".")
        place = component, f"{path}.weight"
        if place not in strengths.blocks:
            guess = nearest(".".join(place), [f"{c}.{n}" for c, n in strengths.blocks])
            raise UsageError(f"a LoRA changes {module}, which {family.title} does not have", hint=f"nearest: {guess}")
        if strength := strengths.at(*place):
            rank = down.shape[0]
            alpha = alpha_of(lora.artifact.facts, module, rank)
            up = factors[f"{module}.lora_up"]
            if place in weights:
                _refuse_misfit(place, weights[place], up, down)
            scale = float(decimal(strength) * decimal(alpha) / rank)
            found[place] = [Update("lora", {"scale": scale}, (up, down))]
    return found


def _refuse_misfit(place: Place, weight: Tensor, up: Tensor, down: Tensor) -> None:
    fits = up.shape[0] == weight.shape[0] and down.shape[1:] in (weight.shape[1:], weight.shape[1:2])
    if not fits or (len(down.shape) == 2 and weight.shape[2:] not in ((), (1, 1))):
        raise UsageError(
            f"a LoRA's factors {list(up.shape)} and {list(down.shape)} do not fit {'.'.join(place)} "
            f"{list(weight.shape)}",
            hint="it was made for a checkpoint of other widths",
        )


def joined(updates: list[Update]) -> list[Update]:
    """Return them as they are: products of factors are added."""
    return updates


def delta(
    weight: torch.Tensor, parameters: dict[str, Any], tensors: list[torch.Tensor], *, exact: bool
) -> torch.Tensor:
    """Return scale · up @ down (up: (out, rank); down: (rank, …))."""
    from sdforge.exact import product

    up, down = tensors
    update = product(up, down.reshape(down.shape[0], -1), sliced=exact).reshape(weight.shape)
    return update * float(parameters["scale"])
