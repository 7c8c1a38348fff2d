"""What LoRA files of every dialect have in common: canonical factors, and alpha as a fact.

A module `unet.down_blocks.0…to_q` has `….lora_down` (rank, in[, k, k]) and `….lora_up` (out, rank); the update is
`alpha / rank · up @ down`. 1×1 convolutions are matrices here. Alpha is left out where every module's equals its rank.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sdforge.errors import UsageError
from sdforge.families import Family, families
from sdforge.formats.layout import Found, Layout
from sdforge.formats.safetensors import Entry
from sdforge.identity import Json

SCALAR = {"F16": "<e", "F32": "<f", "F64": "<d"}


class Pair(NamedTuple):
    """The factors of one module in a file, and its alpha if the file states one."""

    down: Entry
    up: Entry
    alpha: float | None = None


def family_with(modules: Iterable[str]) -> Family | None:
    """Return the family that has all these modules (`component.path`), or None."""
    wanted = set(modules)
    return next((each for each in families() if wanted <= each.modules()), None)


def lora_layout(path: Path, found: Family, pairs: dict[str, Pair]) -> Layout:
    """Return the layout of a LoRA file: `pairs` maps canonical modules to their factors. Raises UsageError."""
    layout = Layout("lora", _meant(found, pairs), [path])
    alphas = {}
    for module, pair in pairs.items():
        rank = pair.down.shape[0]
        if len(pair.down.shape) not in (2, 4) or pair.up.shape[1:2] != (rank,) or set(pair.up.shape[2:]) - {1}:
            raise UsageError(f"{path} has factors for {module} that do not fit together")
        down = pair.down.shape[:2] if pair.down.shape[2:] == (1, 1) else pair.down.shape
        layout.tensors.append(Found("lora", f"{module}.lora_down", pair.down.dtype, down, 0, pair.down.offset))
        up = pair.up.shape[:2]
        layout.tensors.append(Found("lora", f"{module}.lora_up", pair.up.dtype, up, 0, pair.up.offset))
        alphas[module] = float(rank if pair.alpha is None else pair.alpha)
    ranks = {module: pair.down.shape[0] for module, pair in pairs.items()}
    layout.facts |= alpha_fact(alphas, ranks)
    contexts = {p.down.shape[1] for m, p in pairs.items() if m.endswith(("attn2.to_k", "attn2.to_v"))}
    layout.notes["widths"] = {"context": contexts.pop()} if len(contexts) == 1 else {}
    layout.notes["rank"] = max(ranks.values(), default=0)
    return layout


def _meant(found: Family, pairs: dict[str, Pair]) -> str:
    """Return the family that a LoRA is for, or nothing where several have all its modules and no width tells which."""
    fits = [each for each in families() if pairs.keys() <= each.modules()]
    around = {m: len(p.down.shape) == 4 for m, p in pairs.items() if m.endswith((".proj_in", ".proj_out"))}
    fits = [each for each in fits if all(each.is_conv(module) == conv for module, conv in around.items())] or [found]
    contexts = {p.down.shape[1] for m, p in pairs.items() if m.endswith(("attn2.to_k", "attn2.to_v"))}
    fits = [each for each in fits if {each.context} == contexts] or fits
    # a family that takes another's LoRAs leaves the name to that one
    names = [each.name for each in fits if not {other.name for other in fits} & set(each.adapters_of)]
    return names[0] if len(names) == 1 else ""


def alpha_fact(alphas: dict[str, float], ranks: dict[str, int]) -> dict[str, Json]:
    """Return the fact `alpha`: nothing where it is the rank, a number where it is one, else module → number."""
    if all(alphas[module] == ranks[module] for module in alphas):
        return {}
    values = set(alphas.values())
    return {"alpha": values.pop() if len(values) == 1 else dict(alphas)}


def alpha_of(facts: dict[str, Json], module: str, rank: int) -> float:
    """Return a module's alpha from the facts of its LoRA."""
    alpha: Any = facts.get("alpha", rank)
    return float(alpha[module] if isinstance(alpha, dict) else alpha)


def read_scalar(path: Path, entry: Entry) -> float:
    """Read a tensor of one element. Raises UsageError for types that hold no plain number."""
    if entry.size > 8 or entry.dtype not in (*SCALAR, "BF16"):
        raise UsageError(f"{path} states an alpha that is no number")
    with path.open("rb") as file:
        raw = os.pread(file.fileno(), entry.size, entry.offset)
    if entry.dtype == "BF16":
        raw, form = b"\0\0" + raw, "<f"
    else:
        form = SCALAR[entry.dtype]
    value: float = struct.unpack(form, raw)[0]
    return value
