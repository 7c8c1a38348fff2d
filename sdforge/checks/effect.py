"""What is baked, inserted or a sidecar shows in the pictures, and is not there at strength 0."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated, final

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from sdforge.artifact import SIDECARS
from sdforge.checks import Drawn
from sdforge.order import Order, Outcome
from sdforge.settings import Reference, Share, Table, Takes
from sdforge.target import PREVIEWS

VERSION = 1
MAKES = "verdict"
PINNED = False
INLINE = True  # numpy is enough, so it runs in the builder's process

KINDS = ("embedding", "custom", "delta", *SIDECARS)


@final
class Effect(Table):
    """The preset is drawn again without one artifact, with the same prompts and seeds, and once with its strength at 0.

    Differences are root mean squares over all values of a picture, 0 … 1. Present: the largest is `least` or more.
    Absent: what is baked at strength 0 leaves every picture as it is without it, and a word that a prompt does not name
    changes nothing in its pictures, both to within `most`.
    """

    pictures: Drawn = PREVIEWS
    without: Drawn = ""
    at_zero: Annotated[SkipJsonSchema[Reference | None], Takes("pictures")] = Field(
        None, description="what is drawn with its strength at 0"
    )
    of: Annotated[Reference, Takes("lora", reads=(), also=KINDS)] = Field(
        description="what [preset] bakes, inserts or has as a sidecar"
    )
    least: Share = Field(0.01, description="the least difference that counts as an effect")
    most: Share = Field(0.0, description="the largest difference where there should be none")


TABLE = Effect


def run(order: Order, report: Callable[..., None]) -> Outcome:  # noqa: ARG001 -- what runs answer
    """Compare. Raises ActionFailed for a picture that cannot be read."""
    outcome: Outcome = importlib.import_module("sdforge.run.likeness").effect(order)
    return outcome
