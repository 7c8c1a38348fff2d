"""Class images: pictures of a class as a checkpoint draws them, to keep it by (https://arxiv.org/abs/2208.12242)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated, Any, Literal, final

from pydantic import Field

from sdforge.artifact import Artifact
from sdforge.families import deaf
from sdforge.order import Order, Outcome
from sdforge.settings import NotNegative, Reference, Seeded, Takes

VERSION = 1
MAKES = "dataset"
CODE = {"sampler": 1}  # what decides the pictures beside this folder


@final
class ClassImages(Seeded):
    """Draw `count` pictures with DPM-Solver++ 2M (Lu et al. 2022, https://arxiv.org/abs/2211.01095).

    The caption of each is its prompt. For `prior` in trainings on the same checkpoint (prior preservation,
    https://arxiv.org/abs/2208.12242).
    """

    on: Annotated[Reference, Takes("checkpoint", ("unet", "text_encoder", "vae", "tokenizer"))] = Field(
        description="the checkpoint that draws"
    )
    prompt: str = Field("", max_length=1024, description='what all pictures show, as in "a drawing of a girl"')
    prompts: list[Annotated[str, Field(min_length=1, max_length=1024)]] = Field(
        [], max_length=4096, description="instead of `prompt`: several, drawn in turns"
    )
    count: int = Field(200, ge=1, le=100_000, description="pictures in all")
    negative_prompt: str = Field("", max_length=1024, description="what is steered away from")
    steps: int = Field(25, ge=1, le=1000, description="steps of DPM-Solver++ (2M)")
    guidance: NotNegative = Field(7.5, description="scale of classifier-free guidance; 1: none")
    resolution: int = Field(0, ge=0, le=4096, multiple_of=64, description="edge in pixels; 0: the checkpoint's own")
    clip_skip: int = Field(0, ge=0, le=11, description="layers of the text encoder that are left out at the end")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="of the networks' arithmetic")


TABLE = ClassImages


def facts(table: ClassImages) -> dict[str, Any]:
    """Return what the pictures will say before there are any: rows of a data set, in which only digests are missing."""
    prompts = (table.prompts or [table.prompt])[: table.count]
    return {"pictures": [["", prompt, 1] for prompt in prompts]}


def advise(
    table: ClassImages,
    inputs: dict[str, list[Artifact | None]],
) -> list[tuple[str, str, str, str, bool]]:
    """One of `prompt` and `prompts` says what is drawn, to a checkpoint that understands it.

    Returns (role, code, sentence, hint, whether it is a warning).
    """
    wordless = deaf(inputs["on"][0], str(table.on), [table.prompt, *table.prompts])
    found = [("on", "family", *wordless, False)] if wordless else []
    if bool(table.prompt) != bool(table.prompts):
        return found
    sentence = "what is drawn stands in `prompt`, or in `prompts`" + (", not in both" if table.prompt else "")
    return [*found, ("prompt", "prompt", sentence, 'prompt = "a drawing of a girl"', False)]


def run(order: Order, report: Callable[..., None], stopped: Callable[[], bool]) -> Outcome:
    """Draw the pictures, batch by batch; what was drawn before a stop is kept."""
    outcome: Outcome = importlib.import_module("sdforge.trainings.class_images.draw").draw(order, report, stopped)
    return outcome
