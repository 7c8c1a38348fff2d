"""Train states: what is needed to go on as if nothing had happened, published like everything else.

`STEP.safetensors` is published first, `STEP.json` last: a state is there whole or not at all. Two are kept; and two of
later steps, which a longer training left that is otherwise the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from sdforge.dtypes import ITEM_SIZE
from sdforge.errors import UsageError
from sdforge.formats.safetensors import read_header, write_file
from sdforge.store.entries import CHANGED, json_in, sum_of
from sdforge.store.files import make_folder, publish, publish_bytes, read_entry, resources

KEPT = 2
VERSION = 2  # of a description; one of another version is passed over, as if it were damaged
Table = dict[str, tuple[str, tuple[int, ...], bytes | memoryview]]  # name → dtype, shape, bytes


class Stopped(Exception):
    """A training was asked to stop, and has kept its state."""


@dataclass(frozen=True)
class State:
    """A training after `step` steps. notes: what is remembered beside the tensors (losses, fingerprint)."""

    step: int
    tensors: Table
    notes: dict[str, Any]


def save_state(folder: Path, step: int, tensors: Table, notes: dict[str, Any]) -> None:
    """Publish a state, then remove all before it but one, and of those of later steps all but the last two."""
    with resources(f"the state of step {step} cannot be kept"):
        make_folder(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as place:
            written = write_file(
                Path(place) / "state",
                {name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()},
                lambda name: [tensors[name][2]],
            )
            publish(Path(place) / "state", folder / f"{step}.safetensors")
            described = json.loads(json.dumps({"v": VERSION, "step": step, "sha256": written.sha256, "notes": notes}))
            text = json.dumps(described | {"sum": sum_of(described)})
            publish_bytes(text.encode(), folder / f"{step}.json", Path(place))
    steps = sorted(_steps(folder))
    earlier, later = [n for n in steps if n <= step], [n for n in steps if n > step]
    for old in earlier[:-KEPT] + later[:-KEPT]:
        (folder / f"{old}.json").unlink(missing_ok=True)
        (folder / f"{old}.safetensors").unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what a killed process left half written; whoever calls this has the training's lock."""
    for left in folder.glob(".tmp-*"):
        shutil.rmtree(left, ignore_errors=True)


def described_in(data: bytes) -> dict[str, Any]:
    """Return a state's description: `step`, `sha256` of the tensors' file, `notes`.

    Raises ValueError for a damaged one, and for one of another version.
    """
    try:
        value = json_in(data)
    except RecursionError:
        raise ValueError("it describes no state") from None
    if not isinstance(value, dict) or value.get("v") != VERSION:
        raise ValueError(f"it describes no state of version {VERSION}")
    if value.pop("sum", "") != sum_of(value):
        raise ValueError(CHANGED)
    return value


def load_state(folder: Path, most: int) -> State | None:
    """Return the newest whole state of at most `most` steps, or None. Damaged ones are passed over.

    What a killed process left half written is removed: who asks has the training's lock.
    """
    sweep(folder)
    for step in sorted(_steps(folder), reverse=True):
        if step > most:
            continue
        path = folder / f"{step}.safetensors"
        try:
            described, data = described_in(read_entry(folder / f"{step}.json")), memoryview(read_entry(path))
            if hashlib.sha256(data).hexdigest() != described["sha256"]:
                continue
            header = read_header(path)
        except (OSError, ValueError, UsageError):
            continue
        tensors: Table = {
            name: (e.dtype, e.shape, data[e.offset : e.offset + prod(e.shape) * ITEM_SIZE[e.dtype]])
            for name, e in header.tensors.items()
        }
        return State(step, tensors, described["notes"])
    return None


def newest(folder: Path, most: int) -> int:
    """Return after how many steps, at most `most`, the newest state was kept; 0 if there is none. It is not read."""
    return max((step for step in _steps(folder) if step <= most), default=0)


def _steps(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.json") if path.stem.isdigit()] if folder.is_dir() else []
