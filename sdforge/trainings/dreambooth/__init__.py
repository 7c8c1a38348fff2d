"""DreamBooth: a checkpoint learns one subject by a rare word (Ruiz et al. 2022, https://arxiv.org/abs/2208.12242)."""

from __future__ import annotations

from typing import final

from pydantic import Field

from sdforge.artifact import Artifact
from sdforge.settings import Positive
from sdforge.trainings import Advice
from sdforge.trainings.fine_tune import Weights, mistakes

VERSION = 1
MAKES = "checkpoint"
UNCAPTIONED = ("dataset",)  # roles whose pictures need no captions of their own


@final
class Dreambooth(Weights):
    """L = E ‖f(z_t, t, c) − target‖² of the subject + prior_weight · the same of pictures of its class.

    c is what `prompt` says: a rare word before the class, "a drawing of sks girl". `prior` holds pictures of "a drawing
    of a girl", best drawn by the checkpoint itself with [class_images.NAME]; both means are made for themselves, each
    picture with a timestep of its own.
    """

    prompt: str = Field(min_length=1, max_length=1024, description="what every picture shows, with a rare word in it")
    captions: bool = Field(False, description="use the pictures' own captions; those without one show `prompt`")
    learning_rate: Positive = Field(2e-6, description="of AdamW, after the warm-up")
    steps: int = Field(800, ge=1, le=1_000_000, description="updates; about 100 for each picture, 400 to 2000 in all")


TABLE = Dreambooth


def advise(table: Dreambooth, inputs: dict[str, list[Artifact | None]]) -> list[Advice]:
    """As for all weights; and a class that is called as the subject is, or not kept at all."""
    found = mistakes(table, inputs)
    prior = inputs.get("prior", [])
    if not prior:
        sentence = "without `prior` everything of its class comes to look like the subject"
        found.append(("dataset", "prior", sentence, "[class_images.NAME] draws one from the checkpoint", True))
    elif prior[0] is not None and any(row[1] == table.prompt for row in prior[0].notes["rows"]):
        sentence = f"a picture of `{table.prior}` says {table.prompt!r}, as the subject's do: nothing tells them apart"
        found.append(("prior", "prompt", sentence, "a rare word belongs into `prompt`", False))
    return found
