"""CLIP inversion: the embedding of a picture that a base which is shown pictures draws best from.

unCLIP (Ramesh et al. 2022, https://arxiv.org/abs/2204.06125, §3.1) inverts what its encoder says of one picture. Here
the embedding is sought under the diffusion loss, from several pictures, beginning at the mean of what the encoder says.
"""

from __future__ import annotations

from typing import Annotated, Literal, final

from pydantic import Field

from sdforge.artifact import Artifact
from sdforge.families import Family, families, family
from sdforge.settings import NotNegative, Positive, Reference, Takes
from sdforge.trainings import Advice, Shapes, Training

VERSION = 1
MAKES = "image_embedding"
CAPTIONS = False  # are not read
READS = ("unet", "text_encoder", "image_encoder", "image_normalizer", "vae", "tokenizer")


@final
class ClipInversion(Training):
    """argmin over e of E ‖target − f(z_t, t, c(e))‖² + pull · ‖e − ē‖², ē the mean of the pictures' CLIP embeddings.

    No noise is added to the embedding (level 0), captions are not read, and no weight changes.
    """

    on: Annotated[Reference, Takes("checkpoint", READS)] = Field(
        description="the checkpoint that is trained on, of a family that is shown pictures"
    )
    steps: int = Field(500, ge=1, le=1_000_000, description="updates of the embedding")
    learning_rate: Positive = Field(2e-2, description="of AdamW, in root mean squares of ē")
    pull: NotNegative = Field(1e-3, description="λ, of the squared distance from ē: far from it nothing was trained")
    dtype: Literal["fp16", "bf16", "fp32"] = Field("fp32", description="type in which the embedding is kept")

    def learns(self, of: Family, shapes: Shapes) -> tuple[int, str]:  # noqa: ARG002 -- it is the same of all families
        return shapes["image_encoder"]["visual_projection.weight"][0], "fp32"


TABLE = ClipInversion


def advise(table: ClipInversion, inputs: dict[str, list[Artifact | None]]) -> list[Advice]:
    """Refuse a checkpoint that is shown no pictures or has no encoder for them, and pictures to be kept beside."""
    (on,) = inputs["on"]
    found: list[Advice] = []
    if on is not None and on.family and not family(on.family).image_embeddings:
        sentence = f"`{table.on}` draws from words ({family(on.family).title}): there is no image embedding to find"
        known = ", ".join(each.title for each in families() if each.image_embeddings)
        found.append(("on", "image_embedding", sentence, f"take a checkpoint of {known}", False))
    elif on is not None and on.components and "image_encoder" not in on.components:
        sentence = f"`{table.on}` has no image encoder, so nothing says where to begin"
        found.append(("on", "image_encoder", sentence, "take its diffusers folder, which has one", False))
    if table.prior:
        sentence = "CLIP inversion changes no weights: nothing has to be preserved by a prior"
        found.append(("prior", "prior", sentence, "leave `prior` out", False))
    return found
