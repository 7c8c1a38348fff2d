"""Custom Diffusion in weights: W₀ + λ (W − W₀), which λ = 1 makes W itself, and a word with its rows.

Source: Kumari et al. 2022, https://arxiv.org/abs/2212.04488, §3.1
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdforge.artifact import Tensor
from sdforge.edits.bake.update import Place, Strengths, UNetStrength, Update
from sdforge.edits.insert import Word
from sdforge.errors import UsageError
from sdforge.families import Family
from sdforge.formats.custom_diffusion import row_name, words_of
from sdforge.formula import Input

if TYPE_CHECKING:
    import torch


def updates(custom: Input, family: Family, weights: dict[Place, Tensor]) -> dict[Place, list[Update]]:
    """Return the update of every weight that is baked at a strength other than 0. Every matrix must find its layer."""
    strengths = Strengths(custom.use, family, UNetStrength)
    found: dict[Place, list[Update]] = {}
    for name, matrix in custom.tensors("custom").items():
        component, _, path = name.partition(".")
        place = component, path
        if place not in strengths.blocks:
            raise UsageError(f"Custom Diffusion changes {name}, which {family.title} does not have")
        if place in weights and weights[place].shape != matrix.shape:
            raise UsageError(
                f"Custom Diffusion's {name} is {list(matrix.shape)}, and the checkpoint's {list(weights[place].shape)}",
                hint="it was made for a checkpoint of other widths",
            )
        if strength := strengths.at(*place):
            found[place] = [Update("custom", {"strength": strength}, (matrix,), replaces=strength == 1)]
    return found


def words(custom: Input) -> list[Word]:
    """Return the words of an artifact; they are appended whatever the strength, since a word is there or not."""
    rows, encoders = custom.tensors("embedding"), ("text_encoder", "text_encoder_2")
    return [
        Word(word, {e: rows[row_name(e, i)] for e in encoders if row_name(e, i) in rows}, [])
        for i, word in enumerate(words_of(custom.artifact.facts))
    ]


def by_rows(
    parameters: dict[str, Any],  # noqa: ARG001 -- one signature for all kinds
    weight: tuple[int, ...],  # noqa: ARG001
    shapes: list[tuple[int, ...]],  # noqa: ARG001
) -> list[bool]:
    """Say that each row of the change needs the same row of what was trained, and no other."""
    return [True]


def delta(
    weight: torch.Tensor,
    parameters: dict[str, Any],
    tensors: list[torch.Tensor],
    *,
    exact: bool,  # noqa: ARG001 -- differences are
) -> torch.Tensor:
    """Return λ (W − W₀)."""
    (trained,) = tensors
    return (trained.double() - weight) * float(parameters["strength"])
