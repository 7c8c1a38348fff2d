"""What lies in `out/`: which files a preset has there, whether they are whole, and how they get there.

What lies at an output path and is not what a build wrote there last is moved to `out/.replaced/` and named, never
overwritten. Whose it is, lists beside the files say (`written.py`): a build notes there what it is about to write, and
only one at a time writes. The cache's index repeats it, with the files' times, so that a null build reads none of them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdforge.artifact import DIGITS, WITH
from sdforge.errors import ResourceError
from sdforge.graph import Link
from sdforge.identity import digest_of_text
from sdforge.plan import Step
from sdforge.project import Project
from sdforge.store import Store
from sdforge.store.files import Lock, flush_folder, is_settled, make_folder, publish, resources, sha256_of, stat_of
from sdforge.variants import split
from sdforge.written import Noted, Written

REPLACED = ".replaced"
FAILED = ".failed"  # where pictures lie that did not pass the checks of their preset
MANIFEST = 2  # version of `preset.json`
COMPOSED = "made from "  # how the expectation of a file begins that is put together from results and names
ADVISED = ("steps", "guidance", "resolution")  # of the previews: what a preset advises to draw with


def own_name(link: Link) -> str:
    """Return how the file of an artifact is called: NAME, or NAME-VARIANT of what a variant has for itself.

    Other programs keep the files of all presets in one folder, and call embeddings and LoRAs by their files' names.
    """
    name, (recipe, made, _) = link.use.reference.rpartition(":")[2], link.id.partition(":")
    variant = split(recipe)[1] if made else ""  # a source has no recipe that made it
    return f"{name}-{variant}" if variant else name


class Outputs:
    """The output folders of a project."""

    def __init__(self, project: Project, store: Store) -> None:
        self.project, self.store = project, store
        self._memo: dict[str, tuple[str, int, str]] = {}
        self.looked_at: set[str] = set()

    @property
    def lists(self) -> Written:
        """What builds wrote to the folder in which this project's files are made now."""
        return Written(self.project.out)

    def folder(self, step: Step) -> Path:
        return self.project.out / step.node.recipe.name

    def names(self, step: Step) -> dict[str, str]:
        """Return the files of a step's result → their names within the preset's folder."""
        assert step.result is not None
        preset = step.node.recipe.name
        called = self._called(step)
        if step.node.target.signature.makes == "pictures":
            return dict(self._picture_names(step))
        names = {}
        for file in step.result.files:
            head, _, end = file.rpartition(".")
            role, _, rest = file.partition("/")
            own = called.get((role, rest[:DIGITS]))
            names[file] = f"{preset}.{end}" if head == "checkpoint" else f"{own}{rest[DIGITS:]}" if own else file
        return names

    def _called(self, step: Step) -> dict[tuple[str, str], str]:
        """Return (role, digest) → role/name of what becomes a file as it is; equal names of two recipes stay apart."""
        named = [
            (link.use.role, artifact.digest[:DIGITS], link)
            for link, artifact in step.inputs
            if artifact is not None and link.use.role != "checkpoint"
        ]
        last = [(role, own_name(link)) for role, _, link in named]
        return {
            (role, digest): f"{role}/{name if last.count((role, name)) == 1 else link.use.reference.replace(':', '.')}"
            for (role, digest, link), (_, name) in zip(named, last, strict=True)
        }

    def _picture_names(self, step: Step) -> Iterator[tuple[str, str]]:
        assert step.result is not None
        labels: dict[str, str] = {}
        own: dict[str, str] = {}  # digest of a sidecar → its name
        for link, artifact in step.inputs:
            if artifact is not None:
                label = step.node.recipe.name if link.use.role == "checkpoint" else link.use.reference
                found = own if link.use.role == "sidecars" else labels
                found.setdefault(artifact.called, label.replace(":", ".").removeprefix("preset."))
        with_sidecars = {file.partition("/")[0] for file in step.result.files if file.partition("/")[0].endswith(WITH)}
        twice = {file.partition("/")[2] for file in step.result.files if file.partition("/")[0] in with_sidecars}
        for file in step.result.files:
            column, _, rest = file.removesuffix(".png").partition("/")
            label = labels.get(column[:DIGITS], column)
            plain = column + WITH in with_sidecars and f"{rest}.png" in twice
            stem = own[rest[:DIGITS]] + rest[DIGITS:] if rest[:DIGITS] in own else rest
            yield file, f"previews/{stem}-{label}{'-without' if plain else ''}.png"

    def expect(self, recipes: list[str]) -> None:
        """Look up, in one go, what is known of the files of several presets."""
        prefix = [f"out:{self.project.out / name}/" for name in recipes]
        for start in prefix:
            rows = self.store.index.read("seen", "id >= ? AND id < ?", [start, start + "\U0010ffff"])
            self._memo |= {row[0]: row[1:] for row in rows}

    def whole(self, step: Step) -> bool:
        """Say whether all files of a preset's export or previews lie in `out/` as they were made."""
        written = self.written(step)
        return written and all(self._is(self.folder(step) / name, text) for name, text in self.composed(step))

    def written(self, step: Step) -> bool:
        """Say the same of the files that the action itself made."""
        assert step.result is not None
        folder = self.folder(step)
        # every one is looked at, since a verdict rests on all of them
        found = [self._is(folder / name, step.result.files[file][0]) for file, name in self.names(step).items()]
        return all(found)

    def composed(self, step: Step) -> Iterator[tuple[str, str]]:
        """Yield what is put together from results and names when it is written: the file, and what it is made from."""
        if step.node.target.signature.makes == "pictures":
            yield "previews/sheet.png", COMPOSED + self.sheet_source(step)
        else:
            previews = (step.node.recipe.preset or {}).get("previews", {})
            advised = [MANIFEST, *(previews.get(name) for name in ADVISED)]
            checked = verdicts(step)
            licences = [licence for _, a in step.inputs if a is not None and (licence := a.notes.get("licence"))]
            advised += [licences] if licences else []
            told = json.dumps(advised) + (json.dumps(checked) if step.checks or step.unchecked else "")
            yield "preset.json", COMPOSED + self.sheet_source(step) + told

    def sheet_source(self, step: Step) -> str:
        """Name what a composed file is made from: the files, and the names that are written on it."""
        assert step.result is not None
        labels = [link.use.reference for link, _ in step.inputs]
        if step.node.target.signature.makes == "files":
            labels += [name for link, _ in step.inputs if (name := own_name(link)) != link.use.reference]
        return json.dumps([step.node.recipe.name, labels, sorted(step.result.files.items())], sort_keys=True)

    def _is(self, path: Path, expected: str) -> bool:
        """Say whether a file is what it should be: of these bytes, or (`made from …`) untouched since it was made."""
        self.looked_at.add(str(path))
        stat = stat_of(path)
        if stat is None:
            return False
        row = self._row(path)
        if row and row[1] and tuple(json.loads(row[0])) == stat:
            return str(row[2]) == expected or str(row[2]).startswith(f"{expected}\n")
        if not path.is_file():
            return False
        looked, sha256 = time.time_ns(), sha256_of(path)
        value = _value(expected, sha256)
        fits = sha256 == expected
        if expected.startswith(COMPOSED):
            fits = self.lists.is_there(path, _noted(expected, sha256))
        if fits:
            self.store.index.put("seen", {f"out:{path}": (json.dumps(stat), int(is_settled(stat, looked)), value)})
        return fits

    def _row(self, path: Path) -> Any:
        identifier = f"out:{path}"
        if identifier not in self._memo:
            found = self.store.index.read_keyed("seen", [identifier])
            self._memo[identifier] = found.get(identifier, ())
        return self._memo[identifier]

    def lies(self, path: Path, expected: str) -> bool:
        """Say whether a file lies at its place already."""
        return self._is(path, expected)

    def lock(self) -> Lock:
        """Return the lock of who writes to `out/` (not yet held)."""
        return self.store.lock(digest_of_text("out", str(self.project.out)))

    def place(self, path: Path, made: Path, expected: str) -> str:
        """Move a written file to its place in `out/`; return where what was there before has been moved, if it was.

        Raises ResourceError.
        """
        with resources(f"{path} cannot be written"), self.lock() as lock:
            lock.acquire(wait=True)
            moved = self._clear_folders(path)
            make_folder(path.parent)
            # who wrote the file has just hashed what it wrote
            sha256 = sha256_of(made) if expected.startswith(COMPOSED) else expected
            if path.exists() or path.is_symlink():
                moved = self._clear(path, sha256) or moved
            noted = _noted(expected, sha256)
            self.lists.announce(path, noted)  # first: who finds the file must know whose it is, also if this build dies
            beside = path.with_name(f".{path.name}.part")
            _move(made, beside)
            linked = beside.stat().st_nlink > 1  # it is the store's own file too, so nobody may write into it
            publish(beside, path, 0o444 if linked else 0o644)
            self.lists.confirm(path, noted)
            self._note(path, _value(expected, sha256))
        return moved

    def _note(self, path: Path, value: str) -> None:
        stat, now = stat_of(path), time.time_ns()
        assert stat is not None
        row = (json.dumps(stat), int(is_settled(stat, now)), value)
        # what was just written need not be looked at again by this process, though perhaps by the next one
        self._memo[f"out:{path}"] = (row[0], 1, value)
        self.store.index.put("seen", {f"out:{path}": row})

    def _clear(self, path: Path, coming: str) -> str:
        """Make room for a file: what a build wrote there or what is the same may go, anything else is moved aside."""
        stat, settled, value = self.store.index.read_keyed("seen", [f"out:{path}"]).get(f"out:{path}", ("", 0, ""))
        noted = [each.sha256 for each in self.lists.noted(path)]
        ours = {coming, *(noted or [value.rpartition("\n")[2]])}  # no list yet: it was written before there were any
        untouched = bool(settled) and tuple(json.loads(stat)) == stat_of(path)  # a large file is not hashed for that
        if path.is_file() and not path.is_symlink() and (untouched or sha256_of(path) in ours):
            return ""
        return self._set_aside(path, path)

    def _clear_folders(self, path: Path) -> str:
        """Make room for the folders of a file, where something that is no folder lies; say as `_clear` what was moved.

        Raises ResourceError for a link that leads nowhere (its disk may be away), and where `out` itself is no folder.
        """
        for folder in reversed(path.relative_to(self.project.out).parents):
            place = self.project.out / folder
            if place.is_symlink() and not place.exists():
                raise ResourceError(f"{place} is a link to what is not there", "mount its disk, or remove the link")
            if place == self.project.out and place.exists() and not place.is_dir():
                raise ResourceError(f"{place} is no folder, and presets' files go there", "move it elsewhere")
            if place.exists() and not place.is_dir():
                return self._set_aside(place, place.with_name(f"{place.name}.file"))
        return ""

    def _set_aside(self, path: Path, called: Path) -> str:
        """Move what lies at a path to where things lie that were in the way; called: where it would lie in `out/`."""
        aside = self.project.out / REPLACED / called.relative_to(self.project.out)
        place, n = aside, 1
        while os.path.lexists(place):
            place, n = aside.with_name(f"{aside.name}.{n}"), n + 1
        make_folder(place.parent)
        path.replace(place)
        flush_folder(place.parent)  # its new name lasts before another file takes its old one
        return str(place.relative_to(self.project.root))


def _value(expected: str, sha256: str) -> str:
    """Return what the index says of a file: of what is put together, what it was made from and its bytes."""
    return f"{expected}\n{sha256}" if expected.startswith(COMPOSED) else sha256


def _noted(expected: str, sha256: str) -> Noted:
    """Return what the list of written files says of a file."""
    return Noted(sha256, digest_of_text("made from", expected) if expected.startswith(COMPOSED) else "")


def verdicts(step: Step) -> dict[str, Any]:
    """Return what the checks of a preset said: `state` is `passed`, `skipped` (`--no-checks`) or `none`."""
    results = []
    for check in step.checks:
        found: dict[str, Any] = {"check": check.node.target.path[-1], "kind": check.node.target.signature.name}
        if check.result is not None:
            facts = check.result.facts
            state = "passed" if facts["passed"] else "failed"
            found |= {"state": state, "says": facts["says"], "measured": facts["measured"]}
        else:
            found |= {"state": "not run", "says": check.reason}
        results.append(found)
    return {"state": "skipped" if step.unchecked else "passed" if results else "none", "results": results}


def _move(source: Path, target: Path) -> None:
    """Move a file, also across file systems."""
    import shutil

    shutil.move(source, target)
