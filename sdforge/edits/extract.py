"""A LoRA from two checkpoints: what the one has learned beyond the other, in few ranks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated, Literal, final

from pydantic import Field

from sdforge.edits.resize import Ranks
from sdforge.order import Order, Outcome
from sdforge.settings import Reference, Takes

VERSION = 1
MAKES = "lora"
KEEPS_STATE = True  # it goes on where it was stopped


@final
class Extract(Ranks):
    """The best LoRA for tuned − base: of every matrix and convolution the first terms of its decomposition.

    At rank 0, which is any, and with `biases`, baking it into the base gives the tuned checkpoint. What no LoRA can say
    (token tables, and without `biases` biases and norms) is left out, and `forge log` says how much that is.
    Differences of 16-bit checkpoints hold their roundings too: `energy` or a threshold drops those.
    Source: Eckart & Young 1936, https://doi.org/10.1007/BF02288367; LoCon of LyCORIS, https://arxiv.org/abs/2309.14859
    """

    tuned: Annotated[Reference, Takes("checkpoint", ("unet", "text_encoder"), ())]
    base: Annotated[Reference, Takes("checkpoint", ("unet", "text_encoder"), ())]
    components: list[Literal["unet", "text_encoder", "text_encoder_2"]] = Field(
        [], max_length=3, description="of which a LoRA is made; empty: of all that differ"
    )
    biases: bool = Field(
        False, description="also differences of biases and norms, whole, as LyCORIS' diff_b, w_norm and b_norm"
    )


TABLE = Extract


def run(order: Order, report: Callable[..., None], stopped: Callable[[], bool]) -> Outcome:
    """Extract the LoRA. Raises ActionFailed for checkpoints that do not fit or do not differ, and Stopped."""
    outcome: Outcome = importlib.import_module("sdforge.run.low_rank").extract(order, report, stopped)
    return outcome
