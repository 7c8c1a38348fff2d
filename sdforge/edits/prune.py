"""A checkpoint without some of its parts. Nothing is computed."""

from __future__ import annotations

from typing import Annotated, Literal, final

from pydantic import Field

from sdforge.errors import UsageError
from sdforge.families import Family
from sdforge.formula import Input, Plan
from sdforge.settings import Reference, Table, Takes

VERSION = 1
MAKES = "checkpoint"

Part = Literal["unet", "text_encoder", "image_encoder", "vae"]


@final
class Prune(Table):
    """Leave components out, with the facts that belong to them: files without a VAE, or of a U-Net alone.

    What files hold besides (EMA copies, position ids, tables of the noise schedule, a text model's unused layer) is
    never part of a checkpoint here, so there is nothing of it to be pruned; `forge show FILE` says what was read over.
    """

    checkpoint: Annotated[Reference, Takes("checkpoint", (), ())]
    without: list[Part] = Field(
        min_length=1, max_length=3, description="text_encoder: all of them, with their words; image_encoder likewise"
    )


TABLE = Prune


def plan(table: Prune, inputs: dict[str, list[Input]], family: Family) -> Plan:  # noqa: ARG001 -- whatever it has
    """Return what is left out. Raises UsageError where nothing would be left, or the family has no such part."""
    if lost := sorted({part for part in table.without if part not in family.networks}):
        raise UsageError(f"{family.title} has no {lost[0].replace('_', ' ')}", hint="leave it out of `without`")
    without = {name for name in family.networks if any(_belongs(name, part) for part in table.without)}
    if not set(family.networks) - without:
        raise UsageError("nothing would be left of the checkpoint", hint="name fewer parts in `without`")
    facts = {fact for fact, owner in family.owners.items() if owner in without}
    words = {"tokenizer"} if "text_encoder" in without else set()
    return Plan({}, dict.fromkeys(sorted(facts)), family.name, tuple(sorted(without | words)))


def _belongs(component: str, part: str) -> bool:
    """Say whether a component goes where a part goes: text encoders together, and with an image encoder its numbers."""
    return component.startswith(part) or (part == "image_encoder" and component.startswith("image_"))
