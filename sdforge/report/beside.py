"""What lies beside a model's file for other programs: a JSON that A1111 and its kin show, and a preview picture.

A1111 (`ui_extra_networks_user_metadata.py`, and the editor of LoRAs) reads of `NAME.json` beside `NAME.safetensors` its
`description`, `sd version`, `activation text`, `preferred weight`, `negative text` and `notes`; it, SD.Next, ComfyUI
and their extensions show `NAME.preview.png`. Thumbnails are kept out of the files themselves: a picture may come out
differently elsewhere, and equal presets are equal files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from sdforge.artifact import WITH, before_diffusers
from sdforge.drawn import own_column
from sdforge.plan import Step

MODELS = ("checkpoint", "lora", "embedding", "hypernetwork")  # kinds of files that those programs list
VERSIONS = {"sd15": "SD1", "sd2": "SD2", "sdxl": "SDXL"}  # family → A1111's word for it


@dataclass(frozen=True)
class Beside:
    """A file beside a model. of: the model's path; data: its bytes; drawn: or the preview that it is a copy of."""

    path: str
    of: str
    kind: str
    sha256: str
    size: int
    data: bytes = b""
    drawn: str = ""

    def row(self) -> dict[str, Any]:
        """Return what `preset.json` says of it."""
        return {"path": self.path, "kind": self.kind, "of": self.of, "sha256": self.sha256, "bytes": self.size}


def beside(preset: dict[str, Any], settings: dict[str, Any], drawn: Step | None) -> Iterator[Beside]:
    """Yield what belongs beside the models that `preset.json` lists.

    settings: of the export; drawn: the preset's previews, with their result if they are there.
    """
    for row in _models(preset):
        stem = row["path"].rpartition(".")[0]
        data = (json.dumps(about(row, preset, settings), indent=2, ensure_ascii=False) + "\n").encode()
        if stem != "preset":  # whose place is taken
            sha256 = hashlib.sha256(data).hexdigest()
            yield Beside(f"{stem}.json", row["path"], "about", sha256, len(data), data=data)
        name = _picture(drawn, row.get("trigger", [])) if drawn is not None and drawn.result is not None else ""
        if name and drawn is not None and drawn.result is not None:
            sha256, size, *_ = drawn.result.files[name]
            yield Beside(f"{stem}.preview.png", row["path"], "preview", sha256, size, drawn=name)


def _models(preset: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the files that those programs list, of each stem the first one."""
    seen: set[str] = set()
    for row in preset["files"]:
        stem = row["path"].rpartition(".")[0]
        if row["kind"] in MODELS and not before_diffusers(stem) and stem not in seen:
            seen.add(stem)
            yield row


def about(row: dict[str, Any], preset: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what A1111 reads beside a model."""
    words, own = row.get("trigger", []), row["kind"] == "checkpoint"
    if own:
        words = settings["trigger"]
    elif row["kind"] == "embedding":
        words = [PurePosixPath(row["path"]).stem]  # it calls an embedding by the name of its file
    negative = settings["negative_prompt"] if own else ""
    if row.get("negative"):
        words, negative = [], words[0]
    sampler = preset["sampler"]
    advice = [f"sampler {sampler['name']}"]
    advice += [f"{word} {sampler[key]:g}" for word, key in (("steps", "steps"), ("CFG", "guidance")) if key in sampler]
    advice += [f"clip skip {settings['clip_skip'] + 1}"] if settings["clip_skip"] else []
    advice += [f"licence {settings['licence']}"] if settings["licence"] else []
    return {
        "description": settings["description"] or f"{settings['title']}, {row['kind']}",
        "sd version": VERSIONS.get(preset["family"], "Unknown"),
        "activation text": ", ".join(words),
        "preferred weight": row.get("strength", 0.0),  # 0: the program's own
        "negative text": negative,
        "notes": f"{', '.join(advice)}. Made by sdforge from the recipe {preset['preset']}.",
    }


def _picture(drawn: Step, words: list[str]) -> str:
    """Return the first picture of the preset itself that says one of these words, or else its first one."""
    assert drawn.result is not None
    column = own_column(drawn)
    settings = json.loads(drawn.node.target.settings)
    prompts = list(enumerate(settings["prompts"]))
    prompts.sort(key=lambda found: not any(word in found[1] for word in words))
    names = [f"{column}{end}/{p + 1}-{settings['seeds'][0]}.png" for p, _ in prompts for end in (WITH, "")]
    return next((name for name in names if name in drawn.result.files), "")
