"""What null-text inversion found, as a file: `uncond` (T, L, D) and `start` (1, C, H, W), with all that drawing needs.

No other program has a form for it (the authors' code keeps a pickled list of the empty prompts alone), so this is ours:
metadata `sdforge.kind`, `sdforge.family` and `sdforge.facts`, JSON of prompt, guidance, steps, resolution and spacing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdforge.errors import UsageError
from sdforge.formats.layout import Found, Layout
from sdforge.formats.safetensors import Header, stated_json
from sdforge.identity import Json, canonical

KIND, FAMILY, FACTS = "sdforge.kind", "sdforge.family", "sdforge.facts"
NAME = "null_text"
NEEDED: dict[str, Any] = {"prompt": str, "guidance": (int, float), "steps": int, "resolution": int, "spacing": str}


def null_text_metadata(family: str, facts: dict[str, Json]) -> dict[str, str]:
    """Return the metadata of a file with these facts."""
    return {KIND: NAME, FAMILY: family, FACTS: canonical(facts)}


def recognises(path: Path, header: Header | None) -> bool:  # noqa: ARG001 -- one signature for all readers
    return header is not None and header.metadata.get(KIND) == NAME


def read(path: Path, header: Header) -> Layout:
    layout = Layout(NAME, header.metadata.get(FAMILY, ""), [path], facts=_facts(path, header), dialect="sdforge")
    for name, entry in header.tensors.items():
        layout.tensors.append(Found(NAME, name, entry.dtype, entry.shape, 0, entry.offset))
    shapes = layout.shapes().get(NAME, {})
    ranks = {name: len(shape) for name, shape in shapes.items()}
    if ranks != {"uncond": 3, "start": 4} or shapes["uncond"][0] != layout.facts["steps"]:
        raise UsageError(f"{path} holds no empty prompt for each of its steps, or no latents to start from")
    layout.notes["widths"] = {"context": shapes["uncond"][2]}
    return layout


def _facts(path: Path, header: Header) -> dict[str, Json]:
    facts = stated_json(header.metadata, FACTS)
    if not isinstance(facts, dict) or not all(isinstance(facts.get(n), kind) for n, kind in NEEDED.items()):
        raise UsageError(f"{path} does not say with which prompt, guidance and steps it was inverted")
    return facts
