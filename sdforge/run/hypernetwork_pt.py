"""A1111's hypernetworks → safetensors: `python -m sdforge.run.hypernetwork_pt OLD.pt NEW.safetensors FAMILY`.

Pickles could run code when they are opened, so sources are never pickles: they are converted once, by a process of its
own, in which torch takes numbers and plain containers and refuses everything else.
"""

from __future__ import annotations

import argparse
import re
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdforge.errors import ForgeError, UsageError
from sdforge.families import family
from sdforge.formats.hypernetwork import ACTIVATIONS, NAME, SIDES, check_shapes, is_structure, stated
from sdforge.formats.own import own_metadata
from sdforge.formats.safetensors import write_file
from sdforge.identity import Json
from sdforge.run.tensors import NAMES, raw

MEMORY = 8 << 30  # bytes that the process may take
STRUCTURE = [1.0, 2.0, 1.0]  # of files that state none
OLD = {"linear1": "linear.0", "linear2": "linear.1"}  # of the first files, which had two layers
KEY = re.compile(r"linear\.(\d+)\.(weight|bias)")


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Json]]:
    """Return a hypernetwork's tensors under our names, and its facts. Raises UsageError for what is none."""
    try:
        whole = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{path} is no pickle of mere numbers: {first}") from None
    if not isinstance(whole, dict):
        raise UsageError(f"{path} is no hypernetwork")
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
    return tensors, facts


def _facts(path: Path, whole: dict[Any, Any]) -> dict[str, Json]:
    structure = whole.get("layer_structure") or STRUCTURE
    structure = [float(n) for n in structure] if isinstance(structure, list | tuple) else structure
    if not is_structure(structure):
        raise UsageError(f"{path} states layer_structure = {structure!r}, which does not begin and end with 1")
    activation = whole.get("activation_func") or "linear"
    if activation not in ACTIVATIONS:
        raise UsageError(f"{path} has the activation {activation!r}", hint=f"known are {', '.join(ACTIVATIONS)}")
    # files from before it could be said had it, which shows only where there is an activation
    activated = bool(whole.get("activate_output", True)) and activation != "linear"
    normed = bool(whole.get("is_layer_norm", False))
    return stated(structure, activation=activation, activate_output=activated, layer_norm=normed)


def _layers(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of one network, matrices and norms counted: in a file, activations and dropout count too."""
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sdforge.run.hypernetwork_pt", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="a file of A1111")
    parser.add_argument("new", type=Path, help="the safetensors file to write")
    parser.add_argument("family", help="for which it was trained: sd15, …")
    wanted = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        tensors, facts = read(wanted.old)
        metadata = own_metadata(NAME, family(wanted.family).name, facts)
        shapes = {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_file(wanted.new, shapes, lambda name: [raw(tensors[name])], metadata)
    except ForgeError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
