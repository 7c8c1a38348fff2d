"""Hypernetworks: what their tensors and facts are called, and their safetensors file (read and written).

For every width of a context there are two networks, `k` and `v`, of layers counted from 0: `768.k.linear.0.weight`
(out, in), `….bias`, and with layer norms `768.k.norm.0.weight`, `….bias`. The facts that decide what they compute:

structure: widths of the layers' inputs and of the last output, in widths of the context, first and last 1.
activation: behind every layer but the last (`activate_output`: behind that too); layer_norm: behind that, everywhere.
attention: `cross`, where only what the conditioning is turned into is changed; else every attention of that width is.

No other program has a safetensors form, so that is ours; A1111's pickles are in `hypernetwork_pt`.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from sdforge.errors import UsageError
from sdforge.formats.layout import Found, Layout
from sdforge.formats.null_text import FACTS, FAMILY, KIND
from sdforge.formats.safetensors import Header
from sdforge.identity import Json, canonical

NAME = "hypernetwork"
ACTIVATIONS = ("linear", "relu", "leakyrelu", "elu", "swish", "tanh", "sigmoid")
NEUTRAL: dict[str, Json] = {
    "activation": "linear",
    "activate_output": False,
    "layer_norm": False,
    "attention": "all",
}
SIDES = ("k", "v")
TENSOR = re.compile(r"([1-9]\d*)\.([kv])\.(linear|norm)\.(\d+)\.(weight|bias)")


def stated(structure: list[float], **facts: Json) -> dict[str, Json]:
    """Return facts without those at their neutral value."""
    return {"structure": list(structure), **{name: v for name, v in facts.items() if v != NEUTRAL[name]}}


def fact(facts: dict[str, Json], name: str) -> Any:
    """Return a fact, stated or neutral."""
    return facts.get(name, NEUTRAL[name])


def nonlinear(facts: dict[str, Json]) -> str:
    """Say what keeps a hypernetwork from being a matrix and a vector, or nothing."""
    activation = str(fact(facts, "activation"))
    reasons = [activation] if activation != "linear" else []
    return " and ".join([*reasons, *(["layer norms"] if fact(facts, "layer_norm") else [])])


def layers_of(facts: dict[str, Json]) -> int:
    """Return how many linear layers each of the networks has."""
    structure: Any = facts["structure"]
    return len(structure) - 1


def shapes_of(width: int, facts: dict[str, Json]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of one network for contexts of this width: name → shape."""
    structure: Any = facts["structure"]
    sizes = [int(width * share) for share in structure]
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (inner, outer) in enumerate(pairwise(sizes)):
        shapes |= {f"linear.{i}.weight": (outer, inner), f"linear.{i}.bias": (outer,)}
        if fact(facts, "layer_norm"):
            shapes |= {f"norm.{i}.weight": (outer,), f"norm.{i}.bias": (outer,)}
    return shapes


def widths_of(names: list[str]) -> list[int]:
    """Return the widths of contexts for which there are networks."""
    return sorted({int(name.partition(".")[0]) for name in names})


def hypernetwork_metadata(family: str, facts: dict[str, Json]) -> dict[str, str]:
    """Return the metadata of a file with these facts."""
    return {KIND: NAME, FAMILY: family, FACTS: canonical(facts)}


def recognises(path: Path, header: Header | None) -> bool:  # noqa: ARG001 -- one signature for all readers
    if header is None:
        return False
    return header.metadata.get(KIND) == NAME or any(TENSOR.fullmatch(name) for name in header.tensors)


def read(path: Path, header: Header | None) -> Layout:
    assert header is not None
    layout = Layout(NAME, header.metadata.get(FAMILY, ""), [path], facts=_facts(path, header))
    layout.tensors = [Found(NAME, name, e.dtype, e.shape, 0, e.offset) for name, e in header.tensors.items()]
    check_shapes(str(path), {name: entry.shape for name, entry in header.tensors.items()}, layout.facts)
    return layout


def check_shapes(what: str, found: dict[str, tuple[int, ...]], facts: dict[str, Json]) -> None:
    """Refuse tensors that are not the networks that the facts describe. Raises UsageError."""
    strange = sorted(name for name in found if not TENSOR.fullmatch(name))
    if strange or not found:
        raise UsageError(
            f"{what} holds {strange[0]!r}, which is no part of a hypernetwork" if strange else f"{what} is empty"
        )
    for width in widths_of(list(found)):
        for side in SIDES:
            for name, shape in shapes_of(width, facts).items():
                if found.get(f"{width}.{side}.{name}") != shape:
                    raise UsageError(
                        f"{what} has no {width}.{side}.{name} of shape {list(shape)}, as its structure wants",
                        hint=f"it states structure = {facts['structure']}",
                    )
    expected = len(widths_of(list(found))) * len(SIDES) * len(shapes_of(1, facts))
    if len(found) != expected:
        raise UsageError(f"{what} holds {len(found) - expected} tensors more than its structure has")


def _facts(path: Path, header: Header) -> dict[str, Json]:
    try:
        facts = json.loads(header.metadata.get(FACTS, ""))
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or not is_structure(facts.get("structure")):
        raise UsageError(f"{path} does not say which structure and activation its hypernetwork has")
    wrong = [name for name, value in facts.items() if name != "structure" and not _is_fact(name, value)]
    if wrong:
        raise UsageError(f"{path} states {wrong[0]} = {facts[wrong[0]]!r}, which is not known here")
    return stated(**facts)


def is_structure(value: Any) -> bool:
    """Say whether this describes layers: at least one, from the width of the context to the same width."""
    numbers = isinstance(value, list) and all(type(n) in (int, float) and 0 < n <= 64 for n in value)
    return numbers and 2 <= len(value) <= 16 and value[0] == value[-1] == 1


def _is_fact(name: str, value: Any) -> bool:
    if name == "activation":
        return value in ACTIVATIONS
    if name == "attention":
        return value in ("cross", "all")
    return name in NEUTRAL and isinstance(value, bool)
