"""Null-text inversion: a picture as noise and one empty prompt per step (Mokady et al. 2022, https://arxiv.org/abs/2211.09794).

What it makes belongs to one picture and one U-Net. Drawn again with the same prompt it gives the picture, with another
prompt an edit of it: see `sdforge.sidecars.null_text`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, final

from pydantic import Field

from sdforge.artifact import Artifact
from sdforge.formats.tokenizer import LENGTH
from sdforge.order import Order, Outcome
from sdforge.settings import NotNegative, Positive, Reference, Table, Takes
from sdforge.trainings import Advice, On, Shapes, unguided, without

if TYPE_CHECKING:
    from sdforge.families import Family

VERSION = 1
MAKES = "null_text"


@final
class NullTextInversion(Table):
    """For t = T … 1: argmin over ∅_t of ‖z*_{t−1} − DDIM(z̄_t; ε(∅_t) + w (ε(C) − ε(∅_t)))‖², begun at ∅_{t+1}.

    z* is the picture's DDIM inversion under the prompt C without guidance. No weight and no random number is involved.
    The defaults are the paper's, for text of 768 numbers; how near the picture comes back is said at the end.
    Source: algorithm 1 of the paper.
    """

    on: On = Field(description="the checkpoint that is to draw the picture")
    image: Annotated[Reference, Takes("picture")] = Field(description="the picture: a source that is a picture file")
    prompt: str = Field(min_length=1, description="what the picture shows, as its caption")
    guidance: float = Field(7.5, gt=1, allow_inf_nan=False, description="w, with which it will be drawn")
    steps: int = Field(50, ge=1, le=500, description="T, steps of DDIM")
    inner: int = Field(
        10, ge=0, le=1000, description="updates per step; 0: the prompt itself stands on both sides, without any search"
    )
    learning_rate: Positive = Field(1e-2, description="of Adam at the first step, half of it at the last")
    early_stop: NotNegative = Field(
        1e-5, description="mean square error at which a step is good enough; 2e-5 more at every further step"
    )
    resolution: int = Field(
        0, ge=0, le=4096, multiple_of=64, description="edge in pixels of a square picture; 0: the checkpoint's own"
    )
    dtype: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="type in which the result is kept")
    precision: Literal["bf16", "fp32"] = Field("fp32", description="of the networks' arithmetic")

    def state_bytes(self, of: Family, shapes: Shapes) -> int:
        """Return the size of a state before the last step: latents along the way, and the empty prompts, in fp32."""
        edge = (self.resolution or int(of.fact({}, "resolution"))) // 8
        latents = shapes["unet"]["conv_in.weight"][1] * edge**2
        context = shapes["unet"][of.cross_attention[0]][1]
        return 4 * ((self.steps + 2) * latents + (self.steps - 1) * LENGTH * context)


TABLE = NullTextInversion


def advise(table: NullTextInversion, inputs: dict[str, list[Artifact | None]]) -> list[Advice]:
    """Refuse a checkpoint that knows no guidance or no words: nothing would be drawn against the empty prompt."""
    what = "null-text inversion"
    return [*unguided(what, table.on, inputs), *without("text_encoders", what, table.on, inputs)]


def run(order: Order, report: Callable[..., None], stopped: Callable[[], bool]) -> Outcome:
    """Invert the picture. Raises Stopped (the state is kept) or ActionFailed."""
    adapter = importlib.import_module("sdforge.trainings.null_text_inversion.adapter")
    outcome: Outcome = adapter.invert_picture(order, report, stopped)
    return outcome
