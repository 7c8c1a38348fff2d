"""Which tensors a LoRA changes, and where a single file has them: for scripts that have none of our code."""

from __future__ import annotations

import json
from pathlib import Path

from sdforge.families import Family
from sdforge.formats.layout import read_layout
from sdforge.formats.lora import parts_of


def write_places(root: Path, kind: Family) -> None:
    """Write `places.json`: LoRA → the tensors that it changes; canonical tensor → where a single file has it.

    There it is part so and so of so many of a tensor, perhaps turned.
    """
    single = {f"{n.component}.{n.canonical}": [n.single, *n.share, n.turned] for n in kind.names()}
    loras = {path.stem: changed(path) for path in sorted((root / "loras").glob("*/*.safetensors"))}
    found = {"family": kind.name, "single": single, "loras": loras}
    (root / "places.json").write_text(json.dumps(found))


def changed(path: Path) -> list[str]:
    modules: dict[str, set[str]] = {}
    for tensor in read_layout(path).tensors:
        module, _, factor = tensor.name.rpartition(".")
        modules.setdefault(module, set()).add(factor)
    return [f"{part.component}.{part.weight}" for m, factors in modules.items() for part in parts_of(m, factors)]
