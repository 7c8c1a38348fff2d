"""A checkpoint with a part of another one. Nothing is computed: the planner moves the components.

A source may be one network alone: a U-Net, a VAE, a text encoder (of SDXL's two, one takes the place of its like).
"""

from __future__ import annotations

from typing import Annotated, final

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from sdforge.settings import Reference, Table, Takes

VERSION = 1
MAKES = "checkpoint"

Part = Reference | SkipJsonSchema[None]


@final
class Swap(Table):
    """Take components, with the facts that belong to them, from other checkpoints."""

    checkpoint: Annotated[Reference, Takes("checkpoint", (), ())]
    unet: Annotated[Part, Takes("checkpoint", ("unet",), moves=("unet",))] = Field(
        None, description="the checkpoint whose U-Net is taken"
    )
    text_encoder: Annotated[
        Part, Takes("checkpoint", ("text_encoder", "tokenizer"), moves=("text_encoder", "tokenizer"))
    ] = Field(None, description="the checkpoint whose text encoders are taken, with their tokenizers")
    text_encoder_2: Annotated[
        Part, Takes("checkpoint", ("text_encoder_2", "tokenizer"), moves=("text_encoder_2", "tokenizer"))
    ] = Field(None, description="the checkpoint whose second text encoder (SDXL's ViT-bigG) is taken, and no more")
    tokenizer: Annotated[Part, Takes("checkpoint", ("tokenizer",), moves=("tokenizer",))] = Field(
        None, description="the checkpoint, or folder of a tokenizer, whose words are taken; single files have none"
    )
    vae: Annotated[Part, Takes("checkpoint", ("vae",), moves=("vae",))] = Field(
        None, description="the checkpoint whose VAE is taken"
    )


TABLE = Swap
