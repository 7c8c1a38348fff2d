"""What builds wrote to `out/`: a list for each folder there, by which its files are known as ours.

    out/.written/PRESET    a line for a file that is about to be written, and the same once more when it is there:
                           ["PRESET/NAME", SHA256, MADE FROM]

The last two lines of a file count: until it is there, what lies in its place is what was written before. Lists lie
beside the files and not in the cache, since they must last as long: the cache's index can be lost, another cache can be
chosen, and a project's folder moved. What no list names, or a damaged one, counts as a person's, unless the index says
that a build wrote these very bytes there, as it does of what was written before there were lists.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sdforge.store.files import flush_folder, make_folder, publish, read_entry

FOLDER = ".written"
LONGEST = 1000  # lines, after which those that do not count any more are dropped


class Noted(NamedTuple):
    """A file's bytes, and of one that is put together from others the digest of what from ("" of others)."""

    sha256: str
    made_from: str = ""


@dataclass(frozen=True)
class Written:
    """The lists of a project's output folder. Who writes holds the lock of `out/`."""

    out: Path

    def noted(self, path: Path) -> list[Noted]:
        """Return what a build may have left at a path: what it wrote last, or, if it was killed then, what before."""
        return self._read(self._list(path))[1].get(self._name(path), [])

    def is_there(self, path: Path, file: Noted) -> bool:
        """Say whether a build wrote this to a path last, and came to its end with it."""
        return self.noted(path) == [file, file]

    def announce(self, path: Path, file: Noted) -> None:
        """Note, lastingly, what is about to be written. Raises OSError."""
        place = self._list(path)
        make_folder(place.parent)
        self._shorten(place)
        is_new = not place.exists()
        self._append(path, file, lasting=True)
        if is_new:
            flush_folder(place.parent)

    def confirm(self, path: Path, file: Noted) -> None:
        """Note that what was announced is there. Raises OSError."""
        self._append(path, file, lasting=False)  # without this line no more than what was there before counts too

    def _append(self, path: Path, file: Noted, *, lasting: bool) -> None:
        with open(self._list(path), "ab", opener=_own_file) as opened:
            opened.write(_line(self._name(path), file))
            opened.flush()
            if lasting:
                os.fsync(opened.fileno())

    def _shorten(self, place: Path) -> None:
        lines, rows = self._read(place)
        kept = [_line(name, file) for name, files in rows.items() for file in files]
        if lines > max(LONGEST, 2 * len(kept)):
            part = place.with_name(f".{place.name}.part")
            part.write_bytes(b"".join(kept))
            publish(part, place, 0o644)

    @staticmethod
    def _read(place: Path) -> tuple[int, dict[str, list[Noted]]]:
        """Return how many lines a list has, and name → the files that count; nothing of what is no list."""
        rows: dict[str, list[Noted]] = {}
        try:
            lines = read_entry(place).splitlines()
        except (OSError, ValueError):
            return 0, rows
        for line in lines:
            with suppress(ValueError, TypeError):  # damaged, or cut off
                name, *file = json.loads(line)
                rows[name] = [*rows.get(name, [])[-1:], Noted(*map(str, file))]
        return len(lines), rows

    def _list(self, path: Path) -> Path:
        return self.out / FOLDER / path.relative_to(self.out).parts[0]

    def _name(self, path: Path) -> str:
        return path.relative_to(self.out).as_posix()


def _line(name: str, file: Noted) -> bytes:
    """Return a line; it begins with its end, since the one before may have been cut off."""
    return f"\n{json.dumps([name, *file])}".encode()


def _own_file(path: str, flags: int) -> int:
    """Open a list as `open` does, but through no link, and waiting for nobody at the other end of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
