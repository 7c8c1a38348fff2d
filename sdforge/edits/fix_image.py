"""An image embedding is built into a checkpoint that is shown pictures, and the layers for pictures are left out.

What remains belongs to the family that draws from words alone, and every program loads it. Both sides of guidance draw
from the picture: text guides as ever, the picture itself does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, final

from sdforge.edits.bake.image_embedding import CLASS, KIND, LABEL, embedded
from sdforge.errors import UsageError
from sdforge.families import Family
from sdforge.families import family as family_called
from sdforge.formula import Input, Plan, computed, passes
from sdforge.settings import Reference, Table, Takes

if TYPE_CHECKING:
    import torch

VERSION = 1
MAKES = "checkpoint"
BIAS = "time_embedding.linear_2.bias"
PARTS = tuple(f"{CLASS}.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias"))


@final
class FixImage(Table):
    """b_t + W₂ silu(W₁ [e ; level] + b₁) + b₂ becomes the time embedding's bias, and the picture's layers go.

    A U-Net adds both embeddings before it uses either, so that this is exact. The result is a checkpoint of another
    family: a recipe of that family names it as `recipe:target`.
    """

    checkpoint: Annotated[Reference, Takes("checkpoint", ("unet",))]
    image: Annotated[Reference, Takes("image_embedding")]


TABLE = FixImage


def plan(table: FixImage, inputs: dict[str, list[Input]], family: Family) -> Plan:  # noqa: ARG001 -- it has no settings
    """Return the U-Net without the picture's layers. Raises UsageError for a family that is none without pictures."""
    (checkpoint,), (image,) = inputs["checkpoint"], inputs["image"]
    if not family.without_pictures:
        raise UsageError(
            f"{family.title} is no checkpoint of another family with a picture built in",
            hint="[bake.NAME] image_embeddings.NAME = {} lets it draw from the picture whatever it is shown",
        )
    unet, told = checkpoint.tensors("unet"), image.tensors(KIND)
    if not unet:
        raise UsageError("the checkpoint has no unet, into which a picture could be built")
    label, first = told.get(LABEL), unet[PARTS[0]]
    if label is None or label.shape[-1] != first.shape[1]:
        raise UsageError(
            f"the image embedding does not say the {first.shape[1]} numbers that the checkpoint is told of a picture",
            hint="it was found on a checkpoint with another image encoder",
        )
    rows = []
    for name, tensor in unet.items():
        if name == BIAS:
            sources = [tensor, label, *(unet[part] for part in PARTS)]
            rows.append(computed("fix_image", VERSION, name, tensor.dtype, tensor.shape, sources, {}))
        elif name not in PARTS:
            rows.append(passes(tensor))
    plain, facts = family_called(family.without_pictures), checkpoint.artifact.facts
    stated = plain.stated({name: family.fact(facts, name) for name in plain.neutral if name in family.neutral})
    return Plan(
        {"unet": rows},
        {name: stated.get(name) for name in {*facts, *stated}},
        plain.name,
        tuple(sorted(set(family.networks) - set(plain.networks))),
    )


def compute(parameters: dict[str, Any], tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:  # noqa: ARG001
    """Return b_t + W₂ silu(W₁ c + b₁) + b₂ in fp64, from b_t, c, W₁, b₁, W₂, b₂."""
    bias, label, first, first_bias, second, second_bias = tensors
    return bias.double() + embedded(label, first, first_bias, second) + second_bias.double()
