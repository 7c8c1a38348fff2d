"""What a check looks at besides what it takes: the previous build's pictures, files that its command names.

It enters the check's manifest, so that a verdict is found again as long as all of it is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdforge.drawn import Pictures, pictures_of
from sdforge.errors import UsageError
from sdforge.store.files import within

if TYPE_CHECKING:
    from sdforge.plan import Step
    from sdforge.session import Session


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
        if found.digest != now and (result := pictures_of(session.store, found)) and session.holds(result):
            return found
    return None


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
