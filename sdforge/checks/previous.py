"""The preset's pictures look like those of its previous build, by SSIM or PSNR."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import final

from pydantic import Field

from sdforge.checks import Near
from sdforge.order import Order, Outcome
from sdforge.settings import Similarity

VERSION = 1
MAKES = "verdict"
PINNED = False
INLINE = True  # numpy is enough, so it runs in the builder's process


@final
class Previous(Near):
    """Every picture against that of the same prompt and seed in the last build here that passed its checks.

    SSIM and PSNR are those of `likeness`. Where there was no such build, or it drew other prompts, there is nothing to
    compare with, and the check passes and says so. A change that is wanted is taken by `forge build --no-checks`, once:
    later builds are compared with what that wrote.
    """

    most_ssim: Similarity = Field(1.0, description="at most so much, where a change is what is wanted; 1 asks nothing")


TABLE = Previous


def run(order: Order, report: Callable[..., None]) -> Outcome:  # noqa: ARG001 -- what runs answer
    """Compare. Raises ActionFailed for a picture that cannot be read."""
    outcome: Outcome = importlib.import_module("sdforge.run.likeness").like_previous(order)
    return outcome
