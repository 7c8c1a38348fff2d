"""LoRAs become part of a checkpoint's weights: all at once, one rounding, in no order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, final

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from sdforge.artifact import Tensor
from sdforge.errors import UsageError, nearest
from sdforge.families import Family
from sdforge.formats.lora import alpha_of
from sdforge.formula import Input, Made, Plan, cast, computed, passes, target_dtype
from sdforge.identity import decimal
from sdforge.method import resolve_blocks
from sdforge.settings import Block, Reference, Table, Takes, Target, Weight

if TYPE_CHECKING:
    import torch

VERSION = 1
MAKES = "checkpoint"

Own = Weight | SkipJsonSchema[None]


@final
class Strength(Table):
    """How much of a LoRA is baked. A component's number replaces `strength` there, a block's replaces both."""

    strength: Weight = Field(1.0, description="1: as trained; may be negative")
    unet: Own = Field(None, description="default: strength")
    text_encoder: Own = Field(None, description="default: strength")
    text_encoder_2: Own = Field(None, description="default: strength")
    blocks: dict[Block, Weight] = Field({}, description="component or component.block (patterns allowed) → strength")


@final
class Bake(Target):
    """W + Σ strengthᵢ · alphaᵢ / rankᵢ · upᵢ @ downᵢ, every update taken against the same W and rounded once.

    Every factor of every LoRA must find its layer.
    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, §4.1
    """

    checkpoint: Annotated[Reference, Takes("checkpoint", ("unet", "text_encoder"), ())]
    loras: Annotated[dict[Reference, Strength], Field(min_length=1), Takes("lora")]


TABLE = Bake


def plan(table: Bake, inputs: dict[str, list[Input]], family: Family) -> Plan:
    """Return what every tensor is made of. Raises UsageError for factors that fit no layer."""
    (checkpoint,) = inputs["checkpoint"]
    deltas: dict[tuple[str, str], list[tuple[float, Tensor, Tensor]]] = {}
    for lora in inputs["loras"]:
        for key, delta in _deltas(lora, family).items():
            deltas.setdefault(key, []).append(delta)
    result = Plan()
    for component in family.networks:
        touched = any(key[0] == component for key in deltas)
        if component in checkpoint.artifact.components and (touched or (table.dtype and component not in family.kept)):
            rows = [
                _baked(component, tensor, deltas.pop((component, tensor.name), []), table.dtype)
                for tensor in checkpoint.tensors(component).values()
            ]
            result.components[component] = rows
    if deltas:
        lost = sorted(".".join(key) for key in deltas)
        raise UsageError(f"a LoRA has factors for {len(lost)} layers that the checkpoint does not have: {lost[0]}")
    return result


def _deltas(lora: Input, family: Family) -> dict[tuple[str, str], tuple[float, Tensor, Tensor]]:
    """Return (component, weight's name) → (scale, up, down) for what is baked at a strength other than 0."""
    use = Strength.model_validate(lora.use)
    blocks = {(n.component, n.canonical): n.block for n in family.names()}
    places = resolve_blocks(use.blocks, family)
    factors = lora.tensors("lora")
    found = {}
    for name, down in factors.items():
        module, _, factor = name.rpartition(".")
        if factor != "lora_down":
            continue
        component, _, path = module.partition(".")
        weight = f"{path}.weight"
        if (component, weight) not in blocks:
            guess = nearest(f"{component}.{weight}", [f"{c}.{n}" for c, n in blocks])
            raise UsageError(f"a LoRA changes {module}, which {family.title} does not have", hint=f"nearest: {guess}")
        pattern = places.get((component, blocks[component, weight]))
        own = getattr(use, component, None)
        strength = use.blocks[pattern] if pattern else use.strength if own is None else own
        if strength:
            rank = down.shape[0]
            alpha = alpha_of(lora.artifact.facts, module, rank)
            scale = float(decimal(strength) * decimal(alpha) / rank)
            found[component, weight] = scale, factors[f"{module}.lora_up"], down
    return found


def _baked(component: str, tensor: Tensor, deltas: list[tuple[float, Tensor, Tensor]], dtype: str) -> Made:
    target = target_dtype(dtype, tensor)
    if not deltas:
        return passes(tensor) if target == tensor.dtype else cast(tensor.name, tensor, target)
    # the sum is the same in any order, since it is always made in this one
    ordered = sorted(deltas, key=lambda delta: (delta[1].identity, delta[2].identity, delta[0]))
    for _, up, down in ordered:
        fits = up.shape[0] == tensor.shape[0] and down.shape[1:] in (tensor.shape[1:], tensor.shape[1:2])
        if not fits or (len(down.shape) == 2 and tensor.shape[2:] not in ((), (1, 1))):
            raise UsageError(
                f"a LoRA's factors {list(up.shape)} and {list(down.shape)} do not fit {component}.{tensor.name} "
                f"{list(tensor.shape)}",
                hint="it was made for a checkpoint of other widths",
            )
    inputs = [tensor, *(factor for _, up, down in ordered for factor in (up, down))]
    parameters: dict[str, Any] = {"scales": [scale for scale, _, _ in ordered]}
    return computed("bake", VERSION, tensor.name, target, tensor.shape, inputs, parameters)


def compute(parameters: dict[str, Any], tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return W + Σ scale · up @ down in fp64 (W: any shape; up: (out, rank); down: (rank, …))."""
    from sdforge.exact import product

    weight, *factors = tensors
    matrix = weight.double().reshape(weight.shape[0], -1)
    total = matrix.new_zeros(matrix.shape)
    for scale, up, down in zip(parameters["scales"], factors[::2], factors[1::2], strict=True):
        update = product(up, down.reshape(down.shape[0], -1), sliced=dtype.itemsize > 2)
        total = total + update * scale
    return (matrix + total).reshape(weight.shape)
