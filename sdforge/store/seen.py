"""What files had in them when they were last looked at: sources, mostly, which are hashed once and not at every build.

A look counts for later processes only where the file had lain untouched for long enough before it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sdforge.errors import ActionFailed
from sdforge.index import Index
from sdforge.store.files import Stat, is_settled, sha256_of, stat_of

MANY = 500  # files of which the index is told at once
LOOKS = 5  # at a file that somebody writes to, before it is given up


class Seen:
    """(path, stat) → sha256, in the cache's index, and in this process for looks that came too soon after a change."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._looked: dict[Path, tuple[Stat, str]] = {}
        self._places: dict[str, Path] = {}  # sha256 → a file that had it
        self._files: dict[str, Any] = {}  # rows of which the index has not been told yet
        self._gathers = False

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Tell the index of many files at once, and at the end: it waits for the disk each time."""
        before, self._gathers = self._gathers, True
        try:
            yield
        finally:
            self._gathers = before
            self._tell()

    def known_digest(self, path: Path) -> str:
        """Return the sha256 that a file had when it was last looked at, if it has not been touched since; else "".

        A look so soon after a change that it cannot be trusted counts for this process alone: whoever reads the bytes
        verifies them.
        """
        stat = stat_of(path)
        if path in self._looked and self._looked[path][0] == stat:
            return self._looked[path][1]
        row = self.index.read_keyed("seen", [f"file:{path}"]).get(f"file:{path}")
        if row and stat and row[1] and tuple(json.loads(row[0])) == stat:
            return str(row[2])
        return ""

    def digest(self, path: Path) -> str:
        """Return a file's sha256, from the stat cache if it can be trusted."""
        known = self.known_digest(path)
        return known or self.look(path)

    def has(self, path: Path, sha256: str) -> bool:
        """Say whether a file holds these bytes; one that cannot be read, or is still being written, does not."""
        with suppress(OSError, ActionFailed):
            return self.digest(path) == sha256
        return False

    def look(self, path: Path) -> str:
        """Hash a file now, and remember it. Raises ActionFailed for one that changes at every look."""
        for _ in range(LOOKS):
            before, looked = stat_of(path), time.time_ns()
            sha256 = sha256_of(path)
            if before is not None and stat_of(path) == before:
                self.remember(path, before, sha256, looked)
                return sha256
        raise ActionFailed(f"{path} keeps changing while it is read", "build again when nothing writes to it")

    def remember(self, path: Path, stat: Stat, sha256: str, looked_ns: int) -> None:
        """Note what a file's bytes were at a look."""
        self._looked[path], self._places[sha256] = (stat, sha256), path
        self._files[str(path)] = (json.dumps(stat), int(is_settled(stat, looked_ns)), sha256)
        if not self._gathers or len(self._files) >= MANY:
            self._tell()

    def _tell(self) -> None:
        self.index.put("seen", {f"file:{path}": row for path, row in self._files.items()})
        self.index.insert("digests", [(sha256, path) for path, (_, _, sha256) in self._files.items()])
        self._files.clear()

    def note_written(self, path: Path, sha256: str) -> None:
        """Note the bytes of a file that this process has just put in its place, and has hashed when it wrote it."""
        if stat := stat_of(path):
            self._looked[path] = stat, sha256

    def find(self, sha256: str) -> Path | None:
        """Return a file with these bytes that has not changed since it was looked at."""
        places = [str(self._places[sha256])] if sha256 in self._places else []
        places += [place for _, place in self.index.read("digests", "sha256 = ?", [sha256])]
        return next((path for path in map(Path, places) if stat_of(path) and self.has(path, sha256)), None)
