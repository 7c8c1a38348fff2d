"""`preset.json`: what lies in a preset's folder, for people and for programs that load it."""

from __future__ import annotations

import json
from typing import Any

from sdforge.plan import Step


def describe_preset(step: Step, names: dict[str, str]) -> bytes:
    """Return the description of an export: files with the hashes by which other programs know them, words, settings.

    AutoV2 is the first 10 digits of the file's sha256; AutoV3 the first 12 of the sha256 of all bytes after the
    header (Civitai's names).
    """
    assert step.result is not None
    settings = json.loads(step.node.target.settings)
    checkpoint = step.inputs[0][1]
    assert checkpoint is not None
    described: dict[str, Any] = {
        "v": 1,
        "preset": step.node.recipe.name,
        "family": step.node.recipe.family,
        "checkpoint": checkpoint.digest,
        "words": checkpoint.facts.get("tokens", []),
        "negative_prompt": settings["negative_prompt"],
        "clip_skip": settings["clip_skip"],
        "trigger": settings["trigger"],
        "licence": settings["licence"],
        "files": [file_row(names[file], row) for file, row in sorted(step.result.files.items())],
    }
    return (json.dumps(described, indent=2, ensure_ascii=False) + "\n").encode()


def file_row(name: str, row: list[Any]) -> dict[str, Any]:
    """Return what is said of one file: [sha256, bytes, sha256 of the tensors' bytes]."""
    found = {"path": name, "sha256": row[0], "bytes": row[1]}
    if len(row) > 2:
        found |= {"autov2": row[0][:10].upper(), "autov3": row[2][:12].upper()}
    return found
