"""The files that people load: written from what the store has, the same bytes on every machine. It runs no torch."""

from __future__ import annotations

from typing import Annotated, Literal, final

from pydantic import Field

from sdforge.settings import Reference, Table, Takes

VERSION = 1
MAKES = "files"
PINNED = False

Form = Literal["checkpoint", "diffusers", "loras", "embeddings"]


@final
class Whole(Table):
    """An artifact that becomes a file as it is."""


@final
class Export(Table):
    """Write a preset: `checkpoint` (one file), `diffusers` (a folder), `loras` and `embeddings` (files of their own).

    Title, description, licence and triggers reach the files' metadata and nothing else.
    """

    checkpoint: Annotated[Reference, Takes("checkpoint")]
    loras: Annotated[dict[Reference, Whole], Takes("lora")] = Field({})
    embeddings: Annotated[dict[Reference, Whole], Takes("embedding")] = Field({})
    forms: list[Form] = Field([])
    title: str = ""
    description: str = ""
    licence: str = ""
    trigger: list[str] = Field([])
    negative_prompt: str = ""
    clip_skip: int = 0


TABLE = Export
