"""Textual-inversion embeddings in safetensors: read F3 (diffusers), F4 (`emb_params`) and F6 (`clip_l`); write F4.

Canonical: one tensor per text encoder, named as the component (`text_encoder`), of shape (vectors, width). An
embedding with a word for the negative prompt too has that word's rows in a component of their own, and two files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdforge.errors import UsageError
from sdforge.formats.layout import Found, Layout
from sdforge.formats.safetensors import Header

KEY = "emb_params"
ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
TOKEN, POLARITY, GUIDANCE = "sdforge.token", "sdforge.polarity", "sdforge.guidance"  # metadata of files that we write
OPPOSITE = "-neg"  # behind the name of the file with the rows of a word for the negative prompt
FAMILY_OF_WIDTH = {
    768: "sd15",
    1024: "sd2",
}  # widths that say more than they hide; other files take the family of the recipe


def recognises(path: Path, header: Header | None) -> bool:  # noqa: ARG001 -- one signature for all readers
    if header is None:
        return False
    names, shapes = set(header.tensors), [entry.shape for entry in header.tensors.values()]
    known = names <= {KEY, *ENCODERS} and bool(names)
    return known or (len(names) == 1 and len(shapes[0]) in (1, 2) and not any("lora" in n for n in names))


def read(path: Path, header: Header) -> Layout:
    layout = Layout("embedding", "", [path])
    counts = set()
    for raw, entry in header.tensors.items():
        if len(entry.shape) not in (1, 2):
            raise UsageError(f"{path} holds {raw!r} of {len(entry.shape)} dimensions, which is no embedding")
        shape = (1, *entry.shape) if len(entry.shape) == 1 else entry.shape
        counts.add(shape[0])
        name = ENCODERS.get(raw, "text_encoder")
        layout.tensors.append(Found("embedding", name, entry.dtype, shape, 0, entry.offset))
        if name == "text_encoder":
            layout.family = FAMILY_OF_WIDTH.get(shape[1], "")
            layout.notes["widths"] = {"text": shape[1]}
    if "clip_g" in header.tensors:
        layout.family = "sdxl"
    if len(counts) != 1:
        raise UsageError(f"{path} has another number of vectors for each text encoder")
    (name,) = list(header.tensors)[:1]
    own = name not in (KEY, *ENCODERS)
    layout.facts["token"] = header.metadata.get(TOKEN) or (name if own else path.stem)
    if header.metadata.get(POLARITY) == "negative":
        layout.facts["polarity"] = "negative"
    layout.notes["vectors"] = counts.pop()
    return layout


def words_of(facts: dict[str, Any]) -> dict[str, str]:
    """Return the component of an embedding → the word whose rows it holds."""
    words = {"embedding": str(facts["token"])}
    return words | ({"negative": str(facts["negative"])} if "negative" in facts else {})


def negative_word(facts: dict[str, Any]) -> str:
    """Return the word of an embedding that belongs into the negative prompt, or ""."""
    return str(facts["token"]) if facts.get("polarity") == "negative" else str(facts.get("negative", ""))
