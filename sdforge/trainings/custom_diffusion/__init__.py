"""Custom Diffusion: one word and the keys and values that it needs (Kumari et al. 2022, https://arxiv.org/abs/2212.04488)."""

from __future__ import annotations

from math import prod
from typing import Any, Literal, final

from pydantic import Field

from sdforge.artifact import Artifact
from sdforge.families import Family
from sdforge.formats.tokenizer import is_ordinary
from sdforge.settings import NotNegative, Positive
from sdforge.trainings import Advice, Shapes, Token, Training, hides_a_word, never_named, numbers_of_rows, without

VERSION = 1
MAKES = "custom"


@final
class CustomDiffusion(Training):
    """argmin over W_k, W_v of the cross-attention and rows v of a new word of E ‖m (target − f(z_t, t, c))‖² / ‖m‖².

    Captions name the token, best before the noun of what it is (`<toy> cat`). Pictures are shown smaller or closer by
    chance, with words that say so; the mask m leaves out what was added around them. Of the keys and values of the
    start of text, which every prompt shares, no gradient is taken. Source: §3.1, §4 and appendix of the paper.
    """

    token: Token = Field(description="the new word, as prompts will write it")
    vectors: int = Field(1, ge=1, le=64, description="rows of the word: that many of 75 prompt tokens")
    init: str = Field(
        "ktn", max_length=256, description="rare words of one token, whose rows the new ones start from, cycled"
    )
    freeze: Literal["kv", "attention"] = Field(
        "kv",
        description="as diffusers' freeze_model: all but keys and values of the cross-attention, or all but it whole",
    )
    augment: bool = Field(
        True,
        description="show pictures smaller or closer by chance; false for a base that draws in one size alone, which "
        "would unlearn to draw",
    )
    flip: bool = Field(True, description="show pictures mirrored half of the time")
    token_rate: NotNegative = Field(1.0, description="learning rate of the rows, in learning rates of the matrices")
    learning_rate: Positive = Field(8e-5, description="of AdamW, after the warm-up")
    steps: int = Field(300, ge=1, le=1_000_000, description="updates of the weights")
    weight_decay: NotNegative = Field(0.01, description="of AdamW, for the matrices")

    def learns(self, of: Family, shapes: Shapes) -> tuple[int, str]:
        matrices = sum(prod(shapes["unet"][name]) for name in chosen(of, self.freeze))
        return matrices + numbers_of_rows(self.vectors, of, shapes), "fp32"


TABLE = CustomDiffusion

WHOLE = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")


def chosen(family: Family, freeze: str) -> tuple[str, ...]:
    """Return the U-Net's tensors that are trained; none where a family has no separate keys and values."""
    if freeze == "kv":
        return family.cross_attention
    layers = dict.fromkeys(name.rpartition(".to_")[0] for name in family.cross_attention)
    return tuple(f"{layer}.{part}" for layer in layers for part in WHOLE)


def facts(table: CustomDiffusion) -> dict[str, Any]:
    """Return what is known of the artifact before it is trained."""
    return {"token": table.token}


def advise(table: CustomDiffusion, inputs: dict[str, list[Artifact | None]]) -> list[Advice]:
    """Refuse captions that never name the token, and checkpoints in which there is nothing to train."""
    return [
        *never_named(table.token, table.dataset, inputs),
        *without("cross_attention", "Custom Diffusion", table.on, inputs),
    ]


def advise_words(
    table: CustomDiffusion,
    inputs: dict[str, list[Artifact | None]],  # noqa: ARG001 -- one signature for all methods
    tokenizer: dict[str, Any],
) -> list[Advice]:
    """Refuse a token that is a word already, and to start from what is no word."""
    found = hides_a_word(table.token, str(table.on), tokenizer, warning=False)
    words = table.init.split()
    strange = [word for word in words if not is_ordinary(word, tokenizer)]
    if strange or not words:
        sentence = f"{strange[0] if strange else table.init!r} is not one token of `{table.on}` to start from"
        found.append(("init", "init", sentence, 'init = "a word that it knows", near to what is learned', False))
    return found
