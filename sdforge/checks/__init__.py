"""Checks: a file is something that a preset's pictures can be expected to show, `[checks.KIND.NAME]` in a recipe.

Each has a `TABLE` (its settings), `VERSION`, `MAKES` and `run(order, report)`, which looks at pictures and returns a
verdict. A verdict is kept by the key of what was looked at, and decides whether a preset's files are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from sdforge.order import Outcome
from sdforge.settings import NotNegative, Reference, Similarity, Table, Takes
from sdforge.target import PREVIEWS

Drawn = Annotated[SkipJsonSchema[Reference], Takes("pictures"), Field(description="what is looked at")]


class Near(Table):
    """What checks have that compare every picture with another one."""

    pictures: Drawn = PREVIEWS
    ssim: Similarity = Field(0.5, description="at least so much structural similarity: 1 is equal; -1 asks nothing")
    psnr: NotNegative = Field(0.0, description="at least so many dB of peak signal to noise; 0 asks nothing")


def verdict(faults: list[str], says: str, measured: Mapping[str, float]) -> Outcome:
    """Return an outcome: passed if there is no fault. says: what is said where there is none; measured: the figures."""
    figures = {name: round(value, 6) for name, value in measured.items()}
    text = "; ".join(faults[:MOST_FAULTS]) + (f"; and {len(faults) - MOST_FAULTS} more" * (len(faults) > MOST_FAULTS))
    return Outcome(facts={"passed": not faults, "says": text or says, "measured": figures})


MOST_FAULTS = 3  # that a sentence lists
