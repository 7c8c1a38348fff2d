"""The devices of this machine, by what the system shows of them: nothing is imported for that."""

from __future__ import annotations

import os
from pathlib import Path


def devices(wish: str) -> list[str]:
    """Return the devices that a wish (`auto`, `cpu`, `cuda`, `cuda:N`) means here."""
    if wish not in ("auto", "cuda"):
        return [wish]
    found = sorted(int(p.name[6:]) for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdigit())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(found) if visible is None else len([v for v in visible.split(",") if v.strip()])
    if wish == "cuda":
        return [f"cuda:{i}" for i in range(max(1, count))]
    return [f"cuda:{i}" for i in range(count)] or ["cpu"]
