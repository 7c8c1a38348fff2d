"""What a check looks at besides what it takes: the previous build's pictures, files that its command names.

It enters the check's manifest, so that a verdict is found again as long as all of it is the same.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdforge.artifact import DIGITS, WITH
from sdforge.chronicle import Pictures
from sdforge.errors import UsageError
from sdforge.store.entries import Result
from sdforge.store.files import within

if TYPE_CHECKING:
    from sdforge.plan import Step
    from sdforge.session import Session

PREVIEW = re.compile(r"(\d{1,2})-(\d+)-(.+)\.png")  # prompt, seed, of what it is


def looks(session: Session, step: Step) -> dict[str, Any]:
    """Return what of a check's manifest its inputs do not say; nothing while they are not known."""
    target = step.node.target
    if target.signature.name == "previous":
        before = previous_pictures(session, step)
        return {"previous": list(before) if before else []}
    if target.signature.name == "command":
        return {"files": _files(session, target.raw["command"])}
    return {}


def previous_pictures(session: Session, step: Step) -> Pictures | None:
    """Return the pictures of the last build that passed and drew others than these, if the store has them still.

    step: a check, or the previews themselves.
    """
    pictures = next((a for _, a in step.inputs if a is not None and a.kind == "pictures"), step.artifact)
    now = pictures.notes["digest"] if pictures is not None else ""
    for found in session.chronicle.past(step.node.recipe.name).passed:
        if found.digest != now and (result := pictures_of(session, found)) and session.holds(result):
            return found
    return None


def own_column(drawn: Step) -> str:
    """Return the folder of the pictures of the preset itself, among those that its previews drew."""
    return next(a.called for link, a in drawn.inputs if link.use.role == "checkpoint" and a is not None)


def pictures_of(session: Session, pictures: Pictures) -> Result | None:
    """Return the result that holds pictures, if the store still has it."""
    return next((r for r in session.store.known(pictures.key).results if r.digest == pictures.digest), None)


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


def _files(session: Session, command: list[str]) -> dict[str, str]:
    """Return the files of the project that a command names → sha256."""
    found = {}
    for word in command:
        try:
            path = within(session.project.root, word)
        except UsageError:
            continue
        if Path(path).is_file():
            found[word] = session.store.seen.digest(path)
            session.rely_on(path)
    return found
