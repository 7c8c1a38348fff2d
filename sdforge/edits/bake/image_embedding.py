"""An image embedding in weights: the U-Net draws from it whatever picture it is shown. Exact at strength 1.

Where the U-Net takes a vector c for the whole picture, W₂ silu(W₁ c + b₁) + b₂, W₂ becomes 0 and b₂ what
c = [e ; level] gives. Where cross-attention sees the embedding as its one token, the softmax over it is 1, and what the
layer adds is W_o W_v e + b_o: W_v becomes 0, and the rest goes into b_o. Both sides of guidance then draw from it. At
another strength both are mixed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdforge.artifact import Tensor
from sdforge.edits.bake.update import Place, Strengths, Update
from sdforge.errors import UsageError
from sdforge.families import Family
from sdforge.formula import Input

if TYPE_CHECKING:
    import torch

IMAGE, LABEL = "image_embeds", "class_labels"
KIND = "image_embedding"
CLASS = "class_embedding"
VALUES = ".to_v.weight"


def updates(image: Input, family: Family, weights: dict[Place, Tensor]) -> dict[Place, list[Update]]:
    """Return what changes in the layers that take a picture. Raises UsageError for none, or other widths."""
    told = image.tensors(KIND)
    if not family.image_embeddings:
        raise UsageError(
            f"{family.title} draws from words, and has no place for an image embedding",
            hint="bake it into the checkpoint that it was found on",
        )
    strengths = Strengths(image.use, family)
    return _label(told[LABEL], strengths, weights) if LABEL in told else _token(told[IMAGE], family, strengths, weights)


def _label(label: Tensor, strengths: Strengths, weights: dict[Place, Tensor]) -> dict[Place, list[Update]]:
    first, weight = f"{CLASS}.linear_1", f"{CLASS}.linear_2.weight"
    strength = strengths.at("unet", weight)
    if not strength:
        return {}
    _refuse_misfit(label, _weight(weights, f"{first}.weight"))
    parts = (label, *(_weight(weights, name) for name in (f"{first}.weight", f"{first}.bias", weight)))
    return {
        ("unet", weight): [Update(KIND, {"part": "empty", "scale": strength}, ())],
        ("unet", f"{CLASS}.linear_2.bias"): [Update(KIND, {"part": "label", "scale": strength}, parts)],
    }


def _token(
    token: Tensor, family: Family, strengths: Strengths, weights: dict[Place, Tensor]
) -> dict[Place, list[Update]]:
    found: dict[Place, list[Update]] = {}
    for name in family.cross_attention:
        if not name.endswith(VALUES):
            continue
        out = name.removesuffix(VALUES) + ".to_out.0"
        if strength := strengths.at("unet", name):
            values = _weight(weights, name)
            _refuse_misfit(token, values)
            parts = (token, values, _weight(weights, f"{out}.weight"))
            found["unet", name] = [Update(KIND, {"part": "empty", "scale": strength}, ())]
            found["unet", f"{out}.bias"] = [Update(KIND, {"part": "token", "scale": strength}, parts)]
    return found


def _weight(weights: dict[Place, Tensor], name: str) -> Tensor:
    if ("unet", name) not in weights:
        raise UsageError(f"the checkpoint has no unet.{name}, which takes the picture")
    return weights["unet", name]


def _refuse_misfit(told: Tensor, layer: Tensor) -> None:
    if told.shape[-1] != layer.shape[1]:
        raise UsageError(
            f"an image embedding is {told.shape[-1]} numbers wide, and the checkpoint takes {layer.shape[1]}",
            hint="it was found on a checkpoint with another image encoder",
        )


def delta(
    weight: torch.Tensor,
    parameters: dict[str, Any],
    tensors: list[torch.Tensor],
    *,
    exact: bool,  # noqa: ARG001 -- a vector's product is summed in fp64 in any case
) -> torch.Tensor:
    """Return −s W, s W₂ silu(W₁ c + b₁) (from c, W₁, b₁, W₂), or s W_o W_v e (from e, W_v, W_o), in fp64."""
    scale = float(parameters["scale"])
    if parameters["part"] == "empty":
        return -scale * weight
    if parameters["part"] == "label":
        return scale * embedded(*tensors)
    token, values, out = (tensor.double() for tensor in tensors)
    return scale * _product(out, _product(values, token.reshape(-1)))


def embedded(
    label_1L: torch.Tensor, first_HL: torch.Tensor, bias_H: torch.Tensor, second_HH: torch.Tensor
) -> torch.Tensor:
    """Return W₂ silu(W₁ c + b₁) in fp64."""
    hidden_H = _product(first_HL.double(), label_1L.double().reshape(-1)) + bias_H.double()
    return _product(second_HH.double(), hidden_H / (1 + (-hidden_H).exp()))


def _product(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    from sdforge.exact import product

    return product(matrix, vector[:, None], sliced=False)[:, 0]
