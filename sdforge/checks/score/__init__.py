"""CLIP scores: how near pictures are to their prompts, and to a picture (Hessel et al. 2021)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated, final

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from sdforge.checks import Drawn
from sdforge.order import Order, Outcome
from sdforge.settings import Reference, Similarity, Table, Takes
from sdforge.target import PREVIEWS

VERSION = 1
MAKES = "verdict"
PINNED = False
FACTS = ("text_heads", "text_activation", "text_padding", "tokens")


@final
class Score(Table):
    """Cosines of CLIP's embeddings, −1 … 1, averaged over the pictures (CLIPScore without its factor 2.5).

    Hessel et al. 2021, https://arxiv.org/abs/2104.08718. Nothing is downloaded: `clip` is a source, the folder of a
    `CLIPModel`. Prompts are read by the text encoder that belongs to it, which `words` names: not the preset's own,
    since a text encoder that was trained would judge itself.
    """

    pictures: Drawn = PREVIEWS
    clip: Annotated[Reference, Takes("clip")] = Field(description="a source: the folder of a CLIP of transformers")
    words: Annotated[Reference | SkipJsonSchema[None], Takes("checkpoint", ("text_encoder", "tokenizer"), FACTS)] = (
        Field(None, description="a checkpoint whose text encoder is that CLIP's own; needed for `text`")
    )
    to: Annotated[Reference | SkipJsonSchema[None], Takes("picture")] = Field(
        None, description="a source that is a picture; needed for `image`"
    )
    text: Similarity = Field(-1.0, description="at least this mean cosine of a picture and its prompt; -1 asks nothing")
    image: Similarity = Field(-1.0, description="at least this mean cosine of a picture and `to`; -1 asks nothing")


TABLE = Score


def run(order: Order, report: Callable[..., None]) -> Outcome:
    """Look at the pictures. Raises UsageError for a text encoder that is not the CLIP's."""
    outcome: Outcome = importlib.import_module("sdforge.checks.score.adapter").score(order, report)
    return outcome
