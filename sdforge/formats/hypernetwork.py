"""Hypernetworks: what their tensors and facts are called, their safetensors file, and what A1111's pickles hold.

For every width of a context there are two networks, `k` and `v`, of layers counted from 0: `768.k.linear.0.weight`
(out, in), `….bias`, and with layer norms `768.k.norm.0.weight`, `….bias`. The facts that decide what they compute:

structure: widths of the layers' inputs and of the last output, in widths of the context, first and last 1.
activation: behind every layer but the last (`activate_output`: behind that too); layer_norm: behind that, everywhere.
attention: `cross`, where only what the conditioning is turned into is changed; else every attention of that width is.

No other program has a safetensors form, so it is ours (see `own`); pickles are converted into it.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from sdforge.errors import UsageError
from sdforge.formats.layout import Found, Layout
from sdforge.formats.null_text import FACTS, FAMILY, KIND
from sdforge.formats.safetensors import Header, stated_json
from sdforge.identity import Json

NAME = "hypernetwork"
Value = TypeVar("Value")
ACTIVATIONS = ("linear", "relu", "leakyrelu", "elu", "swish", "tanh", "sigmoid")
NEUTRAL: dict[str, Json] = {
    "activation": "linear",
    "activate_output": False,
    "layer_norm": False,
    "attention": "all",
}
SIDES = ("k", "v")
TENSOR = re.compile(r"([1-9]\d{0,5})\.([kv])\.(linear|norm)\.(\d+)\.(weight|bias)")


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


def sequence(facts: dict[str, Json]) -> dict[str, int]:
    """Return `linear.0`, `norm.0`, … → its number in A1111's sequence of a network without dropout."""
    numbers, place, last = {}, 0, layers_of(facts) - 1
    for i in range(last + 1):
        numbers[f"linear.{i}"] = place
        place += 1
        if fact(facts, "activation") != "linear" and (i < last or fact(facts, "activate_output")):
            place += 1
        if fact(facts, "layer_norm"):
            numbers[f"norm.{i}"] = place
            place += 1
    return numbers


def pickled_form(tensors: dict[str, Value], facts: dict[str, Json]) -> dict[Any, Any]:
    """Return what A1111 reads: widths → the states of the two networks, and how those are built.

    Its layers are numbered within a sequence of matrices, activations and norms; widths are whole numbers. No `name` is
    stated: it has its file's then, and with that of another file A1111 would take the one for the other.
    """
    structure: Any = facts["structure"]
    found: dict[Any, Any] = {
        width: [
            {
                f"linear.{number}.{part}": tensors[f"{width}.{side}.{layer}.{part}"]
                for layer, number in sequence(facts).items()
                for part in ("weight", "bias")
            }
            for side in SIDES
        ]
        for width in widths_of(list(tensors))
    }
    return found | {
        "step": 0,
        "layer_structure": [int(n) if n == int(n) else float(n) for n in structure],
        "activation_func": fact(facts, "activation"),
        "is_layer_norm": fact(facts, "layer_norm"),
        "weight_initialization": "Normal",
        "use_dropout": False,
        "dropout_structure": [0] * len(structure),
        "last_layer_dropout": False,
        "activate_output": fact(facts, "activate_output"),
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
        "optional_info": None,
    }


def recognises(path: Path, header: Header | None) -> bool:  # noqa: ARG001 -- one signature for all readers
    if header is None:
        return False
    return header.metadata.get(KIND) == NAME or any(TENSOR.fullmatch(name) for name in header.tensors)


def read(path: Path, header: Header) -> Layout:
    layout = Layout(NAME, header.metadata.get(FAMILY, ""), [path], facts=_facts(path, header), dialect="sdforge")
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
    facts = stated_json(header.metadata, FACTS)
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
