"""Previews that were drawn: which of them show the preset, in the store and in `out/`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from sdforge.artifact import DIGITS, WITH, Artifact
from sdforge.plan import Step
from sdforge.store import Store
from sdforge.store.entries import Result

PREVIEW = re.compile(r"(\d{1,2})-(\d+)-(.+)\.png")  # prompt, seed, of what it is


class Pictures(NamedTuple):
    """Previews that a build drew: key and digest of the result, and which checkpoint's pictures are the preset's."""

    key: str
    digest: str
    column: str


def pictures_in(previews: Artifact) -> Pictures:
    """Return which previews an artifact is."""
    return Pictures(*(previews.notes[name] for name in Pictures._fields))


def own_column(drawn: Step) -> str:
    """Return the folder of the pictures of the preset itself, among those that its previews drew."""
    return next(a.called for link, a in drawn.inputs if link.use.role == "checkpoint" and a is not None)


def pictures_of(store: Store, pictures: Pictures) -> Result | None:
    """Return the result that holds pictures, if the store still has it."""
    return next((r for r in store.known(pictures.key).results if r.digest == pictures.digest), None)


def preset_pictures(result: Result, column: str) -> dict[tuple[int, int], str]:
    """Return (prompt, seed) → sha256 of the pictures of the preset as people get it: with its sidecars, if it has some.

    Prompts count from 1.
    """
    found: dict[tuple[int, int], str] = {}
    for folder in (column[:DIGITS], column[:DIGITS] + WITH):
        for file, row in result.files.items():
            place, _, name = file.removesuffix(".png").partition("/")
            number, _, seed = name.partition("-")
            if place == folder and len(number) < DIGITS:  # else it is named by a sidecar, whose picture it is
                found[int(number), int(seed)] = row[0]
    return found


def previews_in(folder: Path, preset: str) -> dict[tuple[int, int], Path]:
    """Return (prompt, seed) → file of the previews in a preset's folder that show the preset; prompts count from 1."""
    found = {}
    for path in sorted((folder / "previews").glob("*.png")):
        match = PREVIEW.fullmatch(path.name)
        if match and match[3] == preset:
            found[int(match[1]), int(match[2])] = path
    return found
