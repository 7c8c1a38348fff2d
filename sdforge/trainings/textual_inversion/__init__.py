"""Textual inversion: a new word is learned, all else stays (Gal et al. 2022, https://arxiv.org/abs/2208.01618)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import Field

from sdforge.artifact import Artifact
from sdforge.settings import NotNegative, Positive, Since
from sdforge.trainings import Advice, Shapes, Token, Training, advise_token, never_named, numbers_of_rows

if TYPE_CHECKING:
    from sdforge.families import Family

VERSION = 1
MAKES = "embedding"


@final
class TextualInversion(Training):
    """argmin over the rows v of E ‖target − f(z_t, t, c(caption with v))‖².

    Captions name the token (a data set's `{trigger}` becomes it). The rows enter at the input of the text encoder;
    the gradient flows through U-Net and text encoder, which do not change.
    """

    token: Token = Field(description="the new word, as prompts will write it")
    vectors: int = Field(4, ge=1, le=64, description="rows of the embedding: that many of 75 prompt tokens")
    init: str = Field("", max_length=256, description="words whose rows the new ones start from, cycled; empty: noise")
    longest: Annotated[NotNegative, Since(2, 0.0)] = Field(
        0.0, description="largest norm of a row, in medians of the table's; 0: no limit"
    )
    learning_rate: Positive = Field(5e-3, description="of AdamW, after the warm-up")
    steps: int = Field(2000, ge=1, le=1_000_000, description="updates of the rows")
    warmup: int = Field(50, ge=0, description="steps over which the learning rate rises")
    polarity: Literal["positive", "negative"] = Field("positive", description="negative: for the negative prompt")
    dtype: Literal["fp16", "bf16", "fp32"] = Field("fp32", description="type in which the rows are kept")

    def learns(self, of: Family, shapes: Shapes) -> tuple[int, str]:
        return numbers_of_rows(self.vectors, of, shapes), "fp32"


TABLE = TextualInversion


def facts(table: TextualInversion) -> dict[str, Any]:
    """Return what is known of the embedding before it is trained."""
    return {"token": table.token} | ({"polarity": "negative"} if table.polarity == "negative" else {})


def advise(table: TextualInversion, inputs: dict[str, list[Artifact | None]]) -> list[Advice]:
    """Captions that never name the token teach it nothing."""
    return never_named(table.token, table.dataset, inputs)


advise_words = advise_token
