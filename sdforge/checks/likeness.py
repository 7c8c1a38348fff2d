"""A picture of the preset looks like a reference picture, by SSIM or PSNR."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated, final

from pydantic import Field

from sdforge.checks import Near
from sdforge.order import Order, Outcome
from sdforge.settings import Reference, Takes

VERSION = 1
MAKES = "verdict"
PINNED = False
INLINE = True  # numpy is enough, so it runs in the builder's process


@final
class Likeness(Near):
    """SSIM (Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861) and PSNR against a picture that somebody chose.

    The reference is resized to what was drawn. Of several prompts and seeds every one has to be as near, unless
    `prompt` or `seed` say which.
    """

    to: Annotated[Reference, Takes("picture")] = Field(description="the reference: a source that is a picture")
    prompt: int = Field(0, ge=0, le=64, description="only pictures of this prompt, counted from 1; 0: of all")
    seed: int = Field(-1, ge=-1, lt=2**53, description="only pictures of this seed; -1: of all")


TABLE = Likeness


def run(order: Order, report: Callable[..., None]) -> Outcome:  # noqa: ARG001 -- what runs answer
    """Compare. Raises ActionFailed where there is no such picture, or one cannot be read."""
    outcome: Outcome = importlib.import_module("sdforge.run.likeness").like_reference(order)
    return outcome
