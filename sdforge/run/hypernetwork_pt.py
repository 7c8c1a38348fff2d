"""A1111's hypernetworks, as they lie in pickles: their tensors under our names, and their facts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from sdforge.errors import UsageError
from sdforge.formats.hypernetwork import ACTIVATIONS, NAME, SIDES, check_shapes, is_structure, stated
from sdforge.formats.own import own_metadata
from sdforge.identity import Json

STRUCTURE = [1.0, 2.0, 1.0]  # of files that state none
OLD = {"linear1": "linear.0", "linear2": "linear.1"}  # of the first files, which had two layers
KEY = re.compile(r"linear\.(\d+)\.(weight|bias)")


def read_networks(path: Path, whole: dict[Any, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what a pickle's table holds as the tensors and the metadata of our file.

    Raises UsageError for what is no hypernetwork.
    """
    facts = _facts(path, whole)
    tensors: dict[str, Tensor] = {}
    for width, pair in whole.items():
        if type(width) is not int:
            continue
        if not isinstance(pair, tuple | list) or len(pair) != len(SIDES):
            raise UsageError(f"{path} has no pair of networks for contexts {width} wide")
        for side, state in zip(SIDES, pair, strict=True):
            tensors |= {f"{width}.{side}.{name}": tensor for name, tensor in _layers(path, state).items()}
    check_shapes(str(path), {name: tuple(tensor.shape) for name, tensor in tensors.items()}, facts)
    return tensors, own_metadata(NAME, "", facts)


def _facts(path: Path, whole: dict[Any, Any]) -> dict[str, Json]:
    structure = whole.get("layer_structure") or STRUCTURE
    structure = list(structure) if isinstance(structure, list | tuple) else structure
    if not is_structure(structure):
        raise UsageError(f"{path} states layer_structure = {structure!r}, which does not begin and end with 1")
    activation = whole.get("activation_func") or "linear"
    if activation not in ACTIVATIONS:
        raise UsageError(f"{path} has the activation {activation!r}", hint=f"known are {', '.join(ACTIVATIONS)}")
    # files from before it could be said had it, which shows only where there is an activation
    activated = bool(whole.get("activate_output", True)) and activation != "linear"
    normed = bool(whole.get("is_layer_norm", False))
    return stated([float(n) for n in structure], activation=activation, activate_output=activated, layer_norm=normed)


def _layers(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of one network, matrices and norms counted: in a file, activations and dropout count too."""
    if not isinstance(state, dict):
        raise UsageError(f"{path} holds a network that is no table of tensors")
    numbered: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        start, _, part = str(key).rpartition(".")
        found = KEY.fullmatch(f"{OLD.get(start, start)}.{part}")
        if found is None or not isinstance(tensor, Tensor):
            raise UsageError(f"{path} holds {key!r}, which is no part of a hypernetwork")
        numbered.setdefault(int(found[1]), {})[found[2]] = tensor
    layers: dict[str, Tensor] = {}
    counts = {"linear": 0, "norm": 0}
    for _, parts in sorted(numbered.items()):
        if set(parts) != {"weight", "bias"}:
            raise UsageError(f"{path} has a layer without its {'bias' if 'weight' in parts else 'weight'}")
        kind = "linear" if parts["weight"].dim() == 2 else "norm"
        layers |= {f"{kind}.{counts[kind]}.{part}": tensor for part, tensor in parts.items()}
        counts[kind] += 1
    return layers
