"""The devices of this machine, by what the system shows of them: nothing is imported for that."""

from __future__ import annotations

import os
from pathlib import Path

from sdforge.store.files import Lock


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


def device_lock(name: str) -> Lock:
    """Return the lock of a device (not yet held): outside any cache, since a device is the machine's."""
    base = os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/sdforge-{os.getuid()}"
    return Lock(Path(base) / "sdforge" / f"{name.replace(':', '-')}.lock")
