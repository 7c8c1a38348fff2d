"""LoRA files as diffusers and PEFT name them (`unet.….lora_A.weight`), alpha in the metadata: read."""

from __future__ import annotations

import json
import re
from math import sqrt
from pathlib import Path
from typing import Any

from sdforge.errors import UsageError
from sdforge.formats.layout import Layout
from sdforge.formats.lora import Pair, family_with, lora_layout
from sdforge.formats.safetensors import Entry, Header

FACTORS = {".lora_A.weight": "down", ".lora_B.weight": "up", ".lora.down.weight": "down", ".lora.up.weight": "up"}
METADATA = "lora_adapter_metadata"  # since diffusers 0.35: {"unet.r": 8, "unet.lora_alpha": 16, …}


def recognises(path: Path, header: Header | None) -> bool:  # noqa: ARG001 -- one signature for all readers
    return header is not None and any(name.endswith(tuple(FACTORS)) for name in header.tensors)


def read(path: Path, header: Header | None) -> Layout:
    assert header is not None
    parts: dict[str, dict[str, Entry]] = {}
    odd = []
    for raw, entry in header.tensors.items():
        suffix = next((s for s in FACTORS if raw.endswith(s)), None)
        if suffix:
            module = raw.removesuffix(suffix).replace("text_encoder.text_model.", "text_encoder.")
            module = module.replace("text_encoder.", "text_encoder.text_model.")
            if FACTORS[suffix] in parts.setdefault(module, {}):
                raise UsageError(f"{path} has a factor of {module} twice, in two spellings")
            parts[module][FACTORS[suffix]] = entry
        else:
            odd.append(raw)
    if odd:
        raise UsageError(
            f"{path} holds {len(odd)} tensors of a kind of LoRA that cannot be read here: {', '.join(sorted(odd)[:2])}",
            hint="only plain factors (lora_A, lora_B) are read",
        )
    found = family_with(parts)
    if found is None:
        raise UsageError(f"{path} is a LoRA for modules that no family known here has: {', '.join(sorted(parts)[:2])}")
    stated = _stated(path, header.metadata)
    pairs = {}
    for module, entries in parts.items():
        if set(entries) != {"down", "up"}:
            raise UsageError(f"{path} has only one factor for {module}")
        pairs[module] = Pair(entries["down"], entries["up"], _alpha(stated, module, entries["down"].shape[0]))
    return lora_layout(path, found, pairs)


def _stated(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(METADATA, "{}"))
    except ValueError:
        raise UsageError(f"{path} has metadata {METADATA} that is not JSON") from None
    if not isinstance(value, dict) or any(key.endswith(".use_dora") and value[key] for key in value):
        raise UsageError(f"{path} is a DoRA, which cannot be read here")
    return value


def _alpha(stated: dict[str, Any], module: str, rank: int) -> float | None:
    """Return the alpha that the metadata states for a module; PEFT's rsLoRA divides by √rank instead of rank."""
    component, _, name = module.partition(".")
    name = name.removeprefix("text_model.") if component == "text_encoder" else name
    alpha = stated.get(f"{component}.lora_alpha")
    for pattern, value in (stated.get(f"{component}.alpha_pattern") or {}).items():
        if re.search(rf"(^|\.){re.escape(pattern)}$", name):
            alpha = value
    if not isinstance(alpha, int | float):
        return None
    return float(alpha) * (sqrt(rank) if stated.get(f"{component}.use_rslora") else 1.0)
