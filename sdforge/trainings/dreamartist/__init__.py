"""DreamArtist: a word and its opposite, learned together (Dong, Wei, Lin 2022, https://arxiv.org/abs/2211.11337)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, final

from pydantic import Field

from sdforge.artifact import Artifact
from sdforge.settings import NotNegative, Positive
from sdforge.trainings import Advice, Shapes, Token, Training, advise_token, never_named, numbers_of_rows, unguided

if TYPE_CHECKING:
    from sdforge.families import Family

VERSION = 1
MAKES = "embedding"


@final
class DreamArtist(Training):
    """argmin over the rows p, n of E ‖target − ε̂‖², ε̂ = ε(c(caption with n)) + γ (ε(c(caption with p)) − ε(c(… n))).

    Both words are learned through classifier-free guidance, so one picture can be enough; the opposite belongs into the
    negative prompt, and pictures are drawn with about the same guidance. Source: §3.2 of the paper.
    """

    token: Token = Field(description="the new word; <ink> has the opposite <ink-neg>")
    vectors: int = Field(3, ge=1, le=64, description="rows of the word: that many of 75 prompt tokens")
    negative_vectors: int = Field(6, ge=1, le=64, description="rows of its opposite, in the negative prompt")
    guidance: Positive = Field(3.0, description="γ, the scale of guidance that is trained through")
    init: str = Field("", max_length=256, description="words whose rows both start from, cycled; empty: noise")
    longest: NotNegative = Field(0.0, description="largest norm of a row, in medians of the table's; 0: no limit")
    learning_rate: Positive = Field(2.5e-3, description="of AdamW, after the warm-up")
    negative_rate: NotNegative = Field(1.0, description="learning rate of the opposite, in learning rates of the word")
    steps: int = Field(2000, ge=1, le=1_000_000, description="updates of the rows")
    warmup: int = Field(50, ge=0, description="steps over which the learning rate rises")
    dtype: Literal["fp16", "bf16", "fp32"] = Field("fp32", description="type in which the rows are kept")

    def learns(self, of: Family, shapes: Shapes) -> tuple[int, str]:
        return numbers_of_rows(self.vectors + self.negative_vectors, of, shapes), "fp32"


TABLE = DreamArtist


def opposite(token: str) -> str:
    """Return the word for the negative prompt: `<ink>` → `<ink-neg>`, `ink` → `ink-neg`."""
    return f"{token[:-1]}-neg>" if token.endswith(">") else f"{token}-neg"


def facts(table: DreamArtist) -> dict[str, Any]:
    """Return what is known of the embedding before it is trained."""
    return {"token": table.token, "negative": opposite(table.token), "guidance": table.guidance}


def advise(table: DreamArtist, inputs: dict[str, list[Artifact | None]]) -> list[Advice]:
    """Refuse captions that never name the token, and a checkpoint that knows no guidance."""
    return [*never_named(table.token, table.dataset, inputs), *unguided("DreamArtist", table.on, inputs)]


advise_words = advise_token
