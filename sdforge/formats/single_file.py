"""Checkpoints in one safetensors file, in the layout of the CompVis/Stability code (LDM): read and write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdforge.errors import UsageError
from sdforge.families import Family, family_of
from sdforge.formats.layout import Found, Layout
from sdforge.formats.safetensors import Header
from sdforge.identity import Json, canonical

# ComfyUI and its kin tell v-prediction by the presence of these empty tensors
MARKERS: dict[str, tuple[str, Json]] = {"v_pred": ("prediction", "v_prediction"), "ztsnr": ("zero_terminal_snr", True)}
FACTS = "sdforge.facts"  # metadata: facts that the tensors do not show
TOKENIZER = "sdforge.tokenizer"  # metadata: the vocabulary, where it is not the family's usual one


def recognises(path: Path, header: Header | None) -> bool:  # noqa: ARG001 -- one signature for all readers
    return header is not None and _family(header) is not None


def _family(header: Header) -> Family | None:
    return family_of({name: entry.shape for name, entry in header.tensors.items()})


def read(path: Path, header: Header | None) -> Layout:
    assert header is not None
    family = _family(header)
    assert family is not None
    layout = Layout("checkpoint", family.name, [path])
    known = {name.single: name for name in family.names()}
    here, unknown = set(), []
    for raw, entry in header.tensors.items():
        reason = family.ignored(raw)
        name = known.get(family.alias(raw))
        if reason:
            layout.passed[reason] += 1
        elif raw in MARKERS:
            fact, value = MARKERS[raw]
            layout.facts[fact] = value
        elif name and name not in here:
            here.add(name)
            shape = entry.shape[:2] if name.conv and entry.shape[2:] == (1, 1) else entry.shape
            layout.tensors.append(Found(name.component, name.canonical, entry.dtype, shape, 0, entry.offset))
        else:
            unknown.append(raw)
    if unknown:
        raise UsageError(
            f"{path} holds {len(unknown)} tensors that {family.title} does not have: {', '.join(unknown[:3])}",
            hint="is it another family, or a checkpoint with something baked in beside it?",
        )
    _refuse_gaps(path, family, layout)
    _state(path, header.metadata, layout)
    layout.facts = family.stated(layout.facts)
    layout.notes["widths"] = family.widths(layout.shapes())
    return layout


def _refuse_gaps(path: Path, family: Family, layout: Layout) -> None:
    """A component is there whole or not at all."""
    shapes = layout.shapes()
    for name in family.names():
        here = shapes.get(name.component)
        if here and not name.optional and name.canonical not in here:
            raise UsageError(f"{path} has a {name.component} without {name.canonical}", hint="the file is incomplete")


def _state(path: Path, metadata: dict[str, str], layout: Layout) -> None:
    if metadata.get("modelspec.prediction_type") == "v":
        layout.facts["prediction"] = "v_prediction"
    for key in (FACTS, TOKENIZER):
        if key in metadata:
            try:
                value = json.loads(metadata[key])
            except ValueError:
                raise UsageError(f"{path} has metadata {key} that is not JSON") from None
            if key == FACTS:
                layout.facts |= value
            else:
                layout.tokenizer = value
    for key, note in (("modelspec.title", "title"), ("modelspec.license", "licence")):
        if key in metadata:
            layout.notes[note] = metadata[key]


def layout_names(family: Family, names: dict[tuple[str, str], tuple[int, ...]]) -> dict[str, tuple[str, str]]:
    """Return single-file name → (component, canonical name) for the tensors in `names` ((component, name) → shape)."""
    table = {(n.component, n.canonical): n for n in family.names()}
    return {table[key].single: key for key in names}


def single_shape(family: Family, component: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a single file gives a tensor."""
    conv = {(n.component, n.canonical) for n in family.names() if n.conv}
    return (*shape, 1, 1) if (component, name) in conv and len(shape) == 2 else shape


def stated_metadata(facts: dict[str, Json], tokenizer: dict[str, Any] | None) -> dict[str, str]:
    """Return the metadata by which `read` finds facts and vocabulary again."""
    found = {}
    if facts:
        found[FACTS] = canonical(facts)
    if tokenizer:
        found[TOKENIZER] = canonical(tokenizer)
    return found
