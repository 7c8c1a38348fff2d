"""Files of kinds for which no other program has a form: tensors by their names, and metadata that says the rest.

Metadata: `sdforge.kind`, `sdforge.family`, and `sdforge.facts` as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from sdforge.errors import UsageError
from sdforge.formats.layout import Found, Layout
from sdforge.formats.null_text import FACTS, FAMILY, KIND
from sdforge.formats.safetensors import Header, stated_json
from sdforge.identity import canonical

Value = TypeVar("Value")
MANIFEST = "sdforge.manifest"  # metadata: how a file of ours was made, as JSON
# kind (of one component, called as the kind) → the tensor that it cannot do without, and which width that tells
READ = {"image_embedding": ("image_embeds", "image"), "aesthetic": ("text_projection", "text")}


def own_metadata(kind: str, family: str, facts: dict[str, Any]) -> dict[str, str]:
    """Return the metadata of a file."""
    return {KIND: kind, FAMILY: family, FACTS: canonical(facts)}


def own_statement(metadata: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """Return (kind, facts) that a file of ours states; kind "" where it states none, facts as its JSON has them."""
    return metadata.get(KIND, ""), stated_json(metadata, FACTS) if FACTS in metadata else {}


def own_names(components: Mapping[str, Mapping[str, Value]]) -> dict[str, Value]:
    """Return name in a file → what is called so in the artifact (component → name → value).

    Where there are several components, they stand before the names.
    """
    if len(components) == 1:
        return dict(*components.values())
    return {f"{component}.{name}": value for component, found in components.items() for name, value in found.items()}


def recognises(path: Path, header: Header | None) -> bool:  # noqa: ARG001 -- one signature for all readers
    return header is not None and header.metadata.get(KIND) in READ


def read(path: Path, header: Header) -> Layout:
    """Read a file of one of the kinds that have a single component."""
    kind, facts = own_statement(header.metadata)
    if not isinstance(facts, dict):
        raise UsageError(f"{path} does not state its facts as it should")
    needed, width = READ[kind]
    if needed not in header.tensors or not header.tensors[needed].shape:
        raise UsageError(f"{path} holds no {needed}, which is what a file of its kind is about")
    layout = Layout(kind, header.metadata.get(FAMILY, ""), [path], facts=facts, dialect="sdforge")
    for name, entry in header.tensors.items():
        layout.tensors.append(Found(kind, name, entry.dtype, entry.shape, 0, entry.offset))
    layout.notes["widths"] = {width: header.tensors[needed].shape[-1]}
    return layout
