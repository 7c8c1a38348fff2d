"""Aesthetic gradients: a text encoder is steered towards pictures (Gallego 2022, https://arxiv.org/abs/2209.12330).

What it makes holds the direction, which `sdforge.sidecars.aesthetic` follows for every prompt by itself, and the text
encoder as it was steered here, which `bake` puts into a checkpoint.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated, Literal, final

from pydantic import Field

from sdforge.artifact import Artifact
from sdforge.order import Order, Outcome
from sdforge.settings import Positive, Reference, Table, Takes
from sdforge.trainings import Advice, Pictures

VERSION = 1
MAKES = "aesthetic"
CAPTIONS = False  # are not read
FACTS = ("text_heads", "text_activation", "text_padding", "tokens")

Prompt = Annotated[str, Field(min_length=1, max_length=1000)]


@final
class AestheticGradient(Table):
    """T times: θ ← Adam(θ, ∇_θ −cos(P TE_θ(prompt), e)), e the mean of the pictures' normalised CLIP embeddings.

    θ is all of the checkpoint's own text encoder, P the CLIP's projection, read at the prompt's end. With one prompt
    the result is right for that prompt; with several it is a shift of all prompts, the empty one too. No random number
    is involved, and arithmetic is fp32: in bf16 the steps are lost to rounding.
    """

    on: Annotated[Reference, Takes("checkpoint", ("text_encoder", "tokenizer"), FACTS)] = Field(
        description="the checkpoint whose text encoder is steered"
    )
    dataset: Pictures = Field(description="the pictures towards which; their captions are not read")
    clip: Annotated[Reference, Takes("clip")] = Field(
        description="a source: the folder of the CLIP whose text model the text encoder came from"
    )
    prompts: list[Prompt] = Field(
        min_length=1, max_length=256, description="one: steered for it alone; several: for the mean of them"
    )
    steps: int = Field(5, ge=0, le=10_000, description="T, updates of the text encoder")
    learning_rate: Positive = Field(1e-4, description="of Adam: a weight moves by at most about T of these")
    dtype: Literal["fp16", "bf16", "fp32"] = Field("fp32", description="type in which the result is kept")


TABLE = AestheticGradient


def advise(table: AestheticGradient, inputs: dict[str, list[Artifact | None]]) -> list[Advice]:
    """Refuse a checkpoint without just one text encoder; say what several prompts mean."""
    (on,) = inputs["on"]
    found: list[Advice] = []
    encoders = [name for name in (on.components if on else ()) if name.startswith("text_encoder")]
    if on is not None and on.components and len(encoders) != 1:
        sentence = f"`{table.on}` has {len(encoders) or 'no'} text encoders, and a CLIP's projection is for one"
        found.append(("on", "text_encoder", sentence, "take a checkpoint with one text encoder", False))
    if len(table.prompts) > 1:
        sentence = f"steered by {len(table.prompts)} prompts together, it shifts every prompt, the empty one too"
        found.append(("prompts", "generic", sentence, "with one prompt it is right for that one", True))
    return found


def run(order: Order, report: Callable[..., None], stopped: Callable[[], bool]) -> Outcome:
    """Steer. Raises Stopped or ActionFailed; there is no state: it is a matter of seconds."""
    adapter = importlib.import_module("sdforge.trainings.aesthetic_gradient.adapter")
    outcome: Outcome = adapter.steer_encoder(order, report, stopped)
    return outcome
