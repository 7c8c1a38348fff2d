"""The devices of this machine, by what the system shows of them: nothing is imported for that."""

from __future__ import annotations

import os
import re
from itertools import takewhile
from pathlib import Path

from sdforge.store.files import Lock

DEVICES = Path("/dev")
MOST = 64  # devices, where only CUDA_VISIBLE_DEVICES says how many there are


def devices(wish: str) -> list[str]:
    """Return the devices that a wish (`auto`, `cpu`, `cuda`, `cuda:N`) means here."""
    if wish not in ("auto", "cuda"):
        return [wish]
    count = len(_shown())
    if wish == "cuda":
        return [f"cuda:{i}" for i in range(max(1, count))]
    return [f"cuda:{i}" for i in range(count)] or ["cpu"]


def _shown() -> list[str]:
    """Return what CUDA shows as its devices 0, 1, …, by the names that it has for them: a number, or `GPU-…`, `MIG-…`.

    CUDA_VISIBLE_DEVICES lists them up to the first that is none: `-1` hides all.
    """
    nodes = [path for path in DEVICES.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(i) for i in range(len(nodes))]
    count = len(nodes) or (MOST if (DEVICES / "dxg").exists() else 0)  # Windows does not tell how many it has
    names = (name.strip() for name in listed.split(",")) if count else iter(())
    return list(takewhile(lambda name: int(name) < count if name.isdecimal() else name[:4] in ("GPU-", "MIG-"), names))


def device_lock(name: str) -> Lock:
    """Return the lock of a device (not yet held): outside any cache, since a device is the machine's.

    It is that of the device itself, whatever number CUDA_VISIBLE_DEVICES gives it in this process.
    """
    base = os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/sdforge-{os.getuid()}"
    kind, _, number = name.partition(":")
    shown = _shown() if number else []
    own = shown[int(number)] if number and int(number) < len(shown) else number
    return Lock(Path(base) / "sdforge" / f"{'-'.join(filter(None, (kind, own.replace('/', '-'))))}.lock")
