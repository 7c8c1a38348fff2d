"""What a kind of artifact has to say to `bake`: which weights it changes, from what, and how a change is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from sdforge.artifact import Tensor
from sdforge.blocks import LoraPreset, lora_preset, spelled_out
from sdforge.errors import SettingErrors
from sdforge.families import Family
from sdforge.formula import Input
from sdforge.identity import decimal
from sdforge.method import resolve_blocks, resolve_elements
from sdforge.settings import Block, Since, Table, Weight

if TYPE_CHECKING:
    import torch

Own = Weight | SkipJsonSchema[None]
Place = tuple[str, str]  # component, name of a weight


class Update(NamedTuple):
    """A change of one weight.

    kind: the module beside this one that computes it. parameters: what concerns this weight, as JSON; tensors: what
    the change is computed from. replaces: where nothing else changes the weight, it becomes the tensor as it is.
    after: by what those of a kind are sorted first, where their order matters and is to be the same for all weights.
    """

    kind: str
    parameters: dict[str, Any]
    tensors: tuple[Tensor, ...]
    replaces: bool = False
    after: str = ""

    @property
    def order(self) -> tuple[Any, ...]:
        """By what updates of one weight are sorted: no name decides in which order they are added."""
        return (
            self.kind,
            self.after,
            *(tensor.identity for tensor in self.tensors),
            repr(sorted(self.parameters.items())),
        )


class Kind(Protocol):
    """A module beside this one: a kind of artifact that becomes part of weights.

    Where rows of a weight change apart from each other it has `by_rows(parameters, weight, shapes)` too: for a weight
    and tensors of these shapes, which tensors are cut into rows along with the weight, or None if it must be whole.
    """

    def updates(self, given: Input, family: Family, weights: dict[Place, Tensor]) -> dict[Place, list[Update]]:
        """Return what an artifact changes; weights: the checkpoint's. Raises UsageError for what fits nowhere."""
        ...

    def delta(
        self, weight: torch.Tensor, parameters: dict[str, Any], tensors: list[torch.Tensor], *, exact: bool
    ) -> torch.Tensor:
        """Return the change of a weight (any shape, fp64) in fp64.

        exact: the result is kept in more than 16 bits, so products have to be right to the last one.
        """
        ...


class Strength(Table):
    """How much of an artifact is baked. A component's number replaces `strength` there, a block's replaces both.

    What `mbw` or `mbw_preset` say of a block multiplies the number that stands there, as merge programs have it; where
    they say nothing (time and label embedding, the last layers) that number stays.
    """

    strength: Weight = Field(1.0, description="1: as trained; may be negative")
    unet: Own = Field(None, description="default: strength")
    text_encoder: Own = Field(None, description="default: strength")
    text_encoder_2: Own = Field(None, description="default: strength")
    blocks: dict[Block, Weight] = Field(
        {},
        description="component or component.block (patterns allowed: the longest text before a wildcard wins; "
        "`:attn1.to_k` for some tensors) → strength",
    )
    mbw: Annotated[list[Weight] | SkipJsonSchema[None], Since(2, None)] = Field(
        None, description="factors in BASE, IN00 … M00 … OUT11, or in BASE and the blocks with attention alone"
    )
    mbw_preset: Annotated[LoraPreset | SkipJsonSchema[None], Since(2, None)] = Field(
        None, description="such a list that has a name"
    )


class UNetStrength(Table):
    """How much of an artifact that changes the U-Net is baked. A block's number replaces `strength` there."""

    strength: Weight = Field(1.0, description="1: as trained; may be negative")
    blocks: dict[Block, Weight] = Field(
        {},
        description="unet or unet.block (patterns allowed: the longest text before a wildcard wins; "
        "`:attn1.to_k` for some tensors) → strength",
    )


class Strengths:
    """The strength at every weight of a family, as a table of one of the kinds above states it."""

    def __init__(self, use: dict[str, Any], family: Family, table: type[Strength | UNetStrength] = Strength) -> None:
        self.use = table.model_validate(use)
        self.blocks = {(name.component, name.canonical): name.block for name in family.names()}
        self.places = resolve_blocks(self.use.blocks, family)
        self.elements = resolve_elements(self.use.blocks, family)
        self.factors = self._listed(family)

    def at(self, component: str, weight: str) -> float:
        """Return the strength at a weight that the family has."""
        if pattern := self.elements.get((component, weight)):
            return self.use.blocks[pattern]
        return self.in_block((component, self.blocks[component, weight]))

    def in_block(self, place: Place) -> float:
        """Return the strength in a block: (component, block)."""
        if pattern := self.places.get(place):
            return self.use.blocks[pattern]
        own = getattr(self.use, place[0], None)
        strength = self.use.strength if own is None else own
        return float(decimal(strength) * decimal(self.factors.get(place, 1.0)))

    def _listed(self, family: Family) -> dict[Place, float]:
        if not isinstance(self.use, Strength):
            return {}
        values, name = self.use.mbw, self.use.mbw_preset
        if values and name:
            message = "`mbw` and `mbw_preset` are two lists for the same blocks"
            raise SettingErrors([("mbw_preset", message, "leave one out")])
        return spelled_out(values, family) if values else lora_preset(name, family) if name else {}
