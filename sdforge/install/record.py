"""What was put into other programs' folders, so that exactly that can be taken away again.

It lies in `out/.installed/`, a file for each folder that something was put into; nothing is written beside the
program's own files. A row is noted before its file is put there, so that whatever stops us, what is there is known.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdforge.errors import BrokenPromise
from sdforge.store.files import publish_bytes, resources

VERSION = 1
FOLDER = ".installed"  # within `out/`


@dataclass
class Put:
    """A file that was put somewhere. digests: what it may be: after a stop while it was replaced, the old or the new.

    presets: those that it belongs to.
    """

    digests: list[str]
    presets: list[str]


@dataclass
class Record:
    """All that was put into one program's folder: path within it → what; made: folders that were not there before."""

    place: Path  # of the record itself
    into: str
    rows: dict[str, Put] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)

    def write(self) -> None:
        """Keep the record; without rows there is none."""
        if not self.rows and not self.made:
            with resources(f"{self.place} cannot be removed"):
                self.place.unlink(missing_ok=True)
            return
        rows = {path: {"sha256": put.digests, "presets": put.presets} for path, put in sorted(self.rows.items())}
        value = {"v": VERSION, "into": self.into, "files": rows, "made": sorted(self.made)}
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        publish_bytes(text.encode(), self.place, self.place.parent, 0o644)


def read_record(out: Path, into: Path) -> Record:
    """Return what was put into a folder. Raises BrokenPromise for a record that cannot be read."""
    name = hashlib.sha256(str(into).encode()).hexdigest()[:16]
    place = out / FOLDER / f"{name}.json"
    found = Record(place, str(into))
    if not place.exists():
        return found
    try:
        value: dict[str, Any] = json.loads(place.read_bytes())
        if value["v"] != VERSION or value["into"] != str(into):
            raise ValueError(place)
        found.rows = {
            path: Put([str(d) for d in row["sha256"]], [str(p) for p in row["presets"]])
            for path, row in value["files"].items()
        }
        found.made = [str(folder) for folder in value["made"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BrokenPromise(
            f"{place} does not say what forge has put into {into}",
            hint="remove it, and forge takes all that lies there for somebody else's",
        ) from None
    return found
