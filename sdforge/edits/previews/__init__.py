"""Pictures drawn with the preset, and beside them with what it came from: same prompts, same seeds."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated, Literal, final

from pydantic import Field

from sdforge.artifact import SIDECARS, Artifact
from sdforge.families import deaf
from sdforge.order import Order, Outcome
from sdforge.settings import NotNegative, Reference, Seed, Since, Table, Takes

VERSION = 1
MAKES = "pictures"
PINNED = False

Reads = ("unet", "text_encoder", "vae", "tokenizer")


@final
class Beside(Table):
    """A checkpoint that is drawn for comparison, or a sidecar that is drawn with."""


class Drawing(Table):
    """How pictures are drawn."""

    prompts: list[str] = Field([], max_length=64, description="what is drawn")
    seeds: list[Seed] = Field([1, 2], min_length=1, max_length=64, description="each prompt is drawn with each of them")
    negative_prompt: str = Field("", description="what is steered away from")
    steps: int = Field(20, ge=1, le=1000, description="steps of DPM-Solver++ (2M)")
    guidance: NotNegative = Field(7.0, description="scale of classifier-free guidance; 1: none")
    resolution: int = Field(0, ge=0, le=4096, multiple_of=64, description="edge in pixels; 0: the checkpoint's own")
    one_colour: Annotated[Literal["refuse", "allow"], Since(1, "refuse")] = Field(
        "refuse", description="whether a picture all of whose pixels are equal is one; a black one never is"
    )
    clip_skip: int = Field(0, ge=0, le=11, description="layers of the text encoder that are left out at the end")


@final
class Previews(Drawing):
    """Draw the prompts with DPM-Solver++ 2M (Lu et al. 2022, https://arxiv.org/abs/2211.01095), in fp32 noise.

    With sidecars the checkpoint is drawn with and without them; one that has pictures of its own adds them, as they
    were found and as every prompt edits them.
    """

    checkpoint: Annotated[Reference, Takes("checkpoint", Reads)]
    beside: Annotated[dict[Reference, Beside], Takes("checkpoint", Reads)] = Field({})
    sidecars: Annotated[dict[Reference, Beside], Takes(SIDECARS[0], also=SIDECARS[1:])] = Field({})


TABLE = Previews


def advise(table: Previews, inputs: dict[str, list[Artifact | None]]) -> list[tuple[str, str, str, str, bool]]:
    """Refuse words to a checkpoint that is shown pictures alone; (role, code, sentence, hint, whether a warning)."""
    said = [*table.prompts, table.negative_prompt]
    wordless = deaf(inputs["checkpoint"][0], str(table.checkpoint), said)
    return [("checkpoint", "family", *wordless, False)] if wordless else []


def run(order: Order, report: Callable[..., None]) -> Outcome:
    """Draw all pictures into the work folder."""
    outcome: Outcome = importlib.import_module("sdforge.edits.previews.draw").draw(order, report)
    return outcome
