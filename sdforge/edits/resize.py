"""A LoRA of fewer ranks: what matters least of each module is dropped, and nothing is trained again."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated, final

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from sdforge.order import Order, Outcome
from sdforge.settings import NotNegative, Reference, Share, Takes, Target

VERSION = 1
MAKES = "lora"
KEEPS_STATE = True  # it goes on where it was stopped

Rank = Annotated[int, Field(ge=0, le=4096)]


class Ranks(Target):
    """Which singular values of a module are kept: those that every setting allows."""

    rank: Rank = Field(16, description="at most; 0: as many as the other settings leave")
    conv_rank: Rank | SkipJsonSchema[None] = Field(
        None, description="of 3×3 convolutions; 0: those are left out; default: as `rank` says"
    )
    energy: Share = Field(
        1.0, description="the least rank that keeps this share of the sum of squares (kohya's sv_fro is its root)"
    )
    threshold: NotNegative = Field(0.0, description="drop singular values below this")
    relative_threshold: Share = Field(
        0.0, description="drop singular values below this share of the largest (kohya's sv_ratio is 1 / this)"
    )


@final
class Resize(Ranks):
    """The best LoRA of a smaller rank: the first terms of the singular value decomposition of every update.

    LoHa, LoKr, Tucker cores and whole differences of matrices become plain LoRA; what has no more ranks than allowed
    stays as it is, and so do differences of biases and norms. alpha becomes the rank where something is dropped. Of
    several LoRAs at once: their `lora_merge`.
    Source: Eckart & Young 1936, https://doi.org/10.1007/BF02288367; resize_lora of kohya's scripts, LyCORIS.
    """

    lora: Annotated[Reference, Takes("lora")]


TABLE = Resize


def run(order: Order, report: Callable[..., None], stopped: Callable[[], bool]) -> Outcome:
    """Resize the LoRA. Raises ActionFailed for forms that say nothing without their checkpoint, and Stopped."""
    outcome: Outcome = importlib.import_module("sdforge.run.low_rank").resize(order, report, stopped)
    return outcome
