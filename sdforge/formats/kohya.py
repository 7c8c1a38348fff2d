"""LoRA files as kohya's scripts name them, which A1111, Forge, ComfyUI and SD.Next read: read and write."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from sdforge.errors import UsageError
from sdforge.families import Family
from sdforge.formats.layout import Layout
from sdforge.formats.lora import Pair, alpha_of, family_with, lora_layout, read_scalar
from sdforge.formats.safetensors import Entry, Header, header_bytes
from sdforge.identity import Json

# our settings → what kohya's metadata calls them
SETTINGS = {
    "learning_rate": "learning_rate",
    "steps": "steps",
    "batch": "total_batch_size",
    "warmup": "lr_warmup_steps",
    "schedule": "lr_scheduler",
    "min_snr": "min_snr_gamma",
    "clip": "max_grad_norm",
    "caption_dropout": "caption_dropout_rate",
    "seed": "seed",
}
SUFFIXES = {".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha"}


def recognises(path: Path, header: Header | None) -> bool:  # noqa: ARG001 -- one signature for all readers
    return header is not None and any(name.startswith("lora_") for name in header.tensors)


def read(path: Path, header: Header | None) -> Layout:
    assert header is not None
    parts: dict[str, dict[str, Entry]] = {}
    odd = []
    for raw, entry in header.tensors.items():
        suffix = next((s for s in SUFFIXES if raw.endswith(s)), None)
        if suffix:
            parts.setdefault(raw.removesuffix(suffix), {})[SUFFIXES[suffix]] = entry
        else:
            odd.append(raw)
    if odd:
        raise UsageError(
            f"{path} holds {len(odd)} tensors of a kind of LoRA that cannot be read here: {', '.join(sorted(odd)[:2])}",
            hint="only plain LoRA and LoCon factors (lora_down, lora_up, alpha) are read",
        )
    found, names = _family(path, list(parts))
    pairs = {}
    for kohya, entries in parts.items():
        if not {"down", "up"} <= set(entries):
            raise UsageError(f"{path} has only one factor for {kohya}")
        alpha = read_scalar(path, entries["alpha"]) if "alpha" in entries else None
        pairs[names[kohya]] = Pair(entries["down"], entries["up"], alpha)
    layout = lora_layout(path, found, pairs)
    for key, note in (("modelspec.title", "title"), ("modelspec.trigger_phrase", "trigger")):
        if key in header.metadata:
            layout.notes[note] = header.metadata[key]
    return layout


def _family(path: Path, names: list[str]) -> tuple[Family, dict[str, str]]:
    from sdforge.families import families

    best: list[str] = names
    for each in families():
        table = {kohya: module for module, kohya in kohya_names(each).items()}
        missing = [n for n in names if n not in table]
        if not missing and family_with(table[n] for n in names):
            return each, table
        best = min(best, missing, key=len)
    raise UsageError(
        f"{path} is a LoRA for modules that no family known here has: {', '.join(sorted(best)[:2])}",
        hint="is it for another architecture?",
    )


def kohya_names(found: Family) -> dict[str, str]:
    """Return module (`component.path`) → kohya's name, for every module a LoRA of the family can change."""
    names = {}
    for module in found.modules():
        component, _, path = module.partition(".")
        names[module] = found.kohya_prefix[component] + path.replace(".", "_")
    return names


def kohya_tensors(
    found: Family, factors: dict[str, tuple[str, tuple[int, ...]]], facts: dict[str, Json]
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str], dict[str, bytes]]:
    """Lay out a kohya file: (its tensors' dtypes and shapes, its name → canonical name, alphas' bytes by its name).

    factors: canonical name (`….lora_down`, `….lora_up`) → (dtype, shape).
    """
    names = kohya_names(found)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    origin, constant = {}, {}
    for canonical, (dtype, shape) in factors.items():
        module, _, factor = canonical.rpartition(".")
        conv = found.is_conv(module)
        kohya = f"{names[module]}.{factor}.weight"
        shapes[kohya] = dtype, (*shape, 1, 1) if conv and len(shape) == 2 else shape
        origin[kohya] = canonical
        if factor == "lora_down":
            alpha = f"{names[module]}.alpha"
            shapes[alpha] = "F32", ()
            constant[alpha] = struct.pack("<f", alpha_of(facts, module, shape[0]))
    return shapes, origin, constant


def kohya_metadata(found: Family, settings: dict[str, Any], facts: dict[str, Json], rank: int) -> dict[str, str]:
    """Return the least that other programs want to know of a LoRA (`ss_*`), from what decided its result."""
    alpha = facts.get("alpha", float(rank))
    return {
        "ss_v2": "False",
        "ss_base_model_version": found.kohya_version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha) if isinstance(alpha, int | float) else "Dynamic",
        "ss_network_args": "null",
        **{f"ss_{key}": json.dumps(value) for key, value in sorted(settings.items())},
    }


def hashes(
    shapes: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str], data_sha256: str, body: bytes
) -> dict[str, str]:
    """Return `sshs_model_hash` and `sshs_legacy_hash`, by which A1111 and kohya recognise a LoRA.

    The first is the sha256 of the tensors' bytes; the second the first 8 digits of the sha256 of 64 KiB at 1 MiB of
    a file that carries only the `ss_*` metadata (empty for files smaller than that, as theirs is).
    """
    first, _ = header_bytes(shapes, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    legacy = (first + body)[0x100000:0x110000]
    return {"sshs_model_hash": data_sha256, "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8]}
