"""Plans, builds and presets as a notebook shows them: HTML that needs nothing besides, pictures within it."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from sdforge.report.words import GLYPHS

MOST_BYTES = 8 * 10**6  # of a contact sheet that is put into a notebook, which keeps a copy
CELL = ' style="text-align:left;white-space:nowrap"'
TEXT = ' style="text-align:left"'


def plan_html(targets: Sequence[tuple[str, str, str, str, str]]) -> str:
    """Return a table of (target, method, state, digest, reason)."""
    head = "".join(f"<th{CELL}>{word}</th>" for word in ("target", "method", "state", "digest", "why"))
    rows = "".join(
        f"<tr><td{CELL}>{escape(name)}</td><td{CELL}>{escape(method)}</td>"
        f"<td{CELL}>{GLYPHS.get(state, GLYPHS['build'])} {escape(state)}</td>"
        f"<td{CELL}><code>{escape(digest[:8])}</code></td><td{TEXT}>{escape(reason)}</td></tr>"
        for name, method, state, digest, reason in targets
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def preset_html(folder: Path) -> str:
    """Return what `preset.json` in a folder says, and the contact sheet of its previews."""
    path = folder / "preset.json"
    return described_html(json.loads(path.read_bytes())) + sheet_html(folder) if path.is_file() else ""


def described_html(preset: dict[str, Any]) -> str:
    """Return a description of a preset, as `preset.json` has it: words, sampler, checks, licence and files."""
    sampler = preset["sampler"]
    drawn = [
        sampler["name"],
        *(f"{name} {sampler[name]}" for name in ("steps", "guidance", "resolution") if sampler.get(name)),
    ]
    checks = preset.get("checks", {})
    told = [f"{row['check']}: {row['state']}, {row['says']}" for row in checks.get("results", [])]
    rows = {
        "family": preset["family"],
        "words": ", ".join(row["word"] for row in preset["words"]),
        "trigger": ", ".join(preset["trigger"]),
        "negative prompt": preset["negative_prompt"],
        "drawn with": ", ".join(drawn),
        "checks": "; ".join(told) or ("skipped" if checks.get("state") == "skipped" else ""),
        "licence": preset["licence"],
        "files": ", ".join(row["path"] for row in preset["files"] if not row["path"].startswith("diffusers/")),
    }
    cells = "".join(
        f"<tr><th{CELL}>{name}</th><td{TEXT}>{escape(str(text))}</td></tr>" for name, text in rows.items() if text
    )
    return f"<h4>{escape(preset['preset'])}</h4><table><tbody>{cells}</tbody></table>"


def sheet_html(folder: Path) -> str:
    """Return the contact sheet of a preset's previews as a picture, or nothing where there is none."""
    path = folder / "previews" / "sheet.png"
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    alt = f"previews of {escape(folder.name)}: prompts and seeds down, what it came from across"
    return f'<img alt="{alt}" style="max-width:100%" src="data:image/png;base64,{data}">'
