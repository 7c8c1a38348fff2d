"""What a check looks at besides what it takes: the previous build's pictures, files that its command names.

It enters the check's manifest, so that a verdict is found again as long as all of it is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdforge.chronicle import Chronicle
from sdforge.drawn import Pictures, pictures_of
from sdforge.errors import UsageError
from sdforge.plan import Step
from sdforge.store import Store
from sdforge.store.entries import Result
from sdforge.store.files import within


@dataclass(frozen=True)
class Looks:
    """What the checks of a project look at.

    root: the project's folder; holds: whether the bytes of a result are there; rely_on: is told of every file.
    """

    root: Path
    store: Store
    chronicle: Chronicle
    holds: Callable[[Result], bool]
    rely_on: Callable[[Path], None]

    def of(self, step: Step) -> dict[str, Any]:
        """Return what of a check's manifest its inputs do not say; nothing while they are not known."""
        target = step.node.target
        if target.signature.name == "previous":
            before = self._previous_pictures(step)
            return {"previous": list(before) if before else []}
        if target.signature.name == "command":
            return {"files": self._files(target.raw["command"])}
        return {}

    def _previous_pictures(self, step: Step) -> Pictures | None:
        """Return the pictures of the last build that passed and drew others than these, if the store has them still.

        step: a check, or the previews themselves.
        """
        pictures = next((a for _, a in step.inputs if a is not None and a.kind == "pictures"), step.artifact)
        now = pictures.notes["digest"] if pictures is not None else ""
        for found in self.chronicle.past(step.node.recipe.name).passed:
            if found.digest != now and (result := pictures_of(self.store, found)) and self.holds(result):
                return found
        return None

    def _files(self, command: list[str]) -> dict[str, str]:
        """Return the files of the project that a command names → sha256."""
        found = {}
        for word in command:
            try:
                path = within(self.root, word)
            except UsageError:
                continue
            if Path(path).is_file():
                found[word] = self.store.seen.digest(path)
                self.rely_on(path)
        return found
