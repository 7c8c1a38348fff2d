"""`forge verify`: hash again all that the cache keeps and `out/` holds, and name what is not what it was.

A damaged entry of the cache is set aside, as a build would do that reads it: the next build makes it again, or says
how a trained result is to be had. Outputs and sources are the user's: they are named, and stay where they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdforge.errors import ForgeError, ResourceError
from sdforge.plan import Plan
from sdforge.report.words import glyphs, safe, seconds, size
from sdforge.run.states import described_in
from sdforge.session import Session
from sdforge.store.entries import CHANGED, Result, alias_in, load_result, preimage_in
from sdforge.store.files import CHUNK, damaged, open_regular, read_entry


@dataclass(frozen=True)
class Damage:
    """Something that is not what it was. lost: the targets (or keys) whose results are of no use without it."""

    path: Path
    reason: str
    lost: tuple[str, ...] = ()


@dataclass
class Findings:
    """What was looked at."""

    files: int = 0
    bytes: int = 0
    damages: list[Damage] = field(default_factory=list)


class Verifier:
    """Looks at the files of a store, of sources and of outputs, one after the other."""

    def __init__(self, session: Session) -> None:
        self.session, self.store, self.seen = session, session.store, Findings()
        self._todo = 0  # bytes

    def everything(self) -> Findings:
        """Look at the whole cache, at all sources, and at what all recipes have in `out/`."""
        objects = self._under("objects", "*/*")
        self._todo = sum(map(_size, objects))
        for path in self._under("results", "*/*/*"):
            self._judge(path, load_result)
        for path in self._under("aliases", "*/*"):
            self._judge(path, lambda found: alias_in(found.name, read_entry(found)))
        for path in self._under("preimages", "*/*"):
            self._judge(path, lambda found: preimage_in(found.name, read_entry(found)))
        for path in self._under("states", "*/*/*.json"):
            self._state(path)
        # planning might set damaged ones aside by itself, so the cache comes first
        self._drop([result for _, result in self.store.results()], self._lost(objects))
        plans = list(self._plans(self.session.project.preset_names()))
        self._lacks([result for plan in plans for step in plan.steps.values() if (result := step.result)])
        self._people(plans)
        return self.seen

    def targets(self, names: list[str]) -> Findings:
        """Look at the results of these targets and of all that they are made from, and at their sources and outputs."""
        plan = self.session.plan(self.session.resolve(names))
        results = [step.result for step in plan.steps.values() if step.result]
        whole = [replace(result, record=self.store.record(result)) for result in results]
        paths = {self.store.object(name) for result in whole for name in result.objects()}
        objects = sorted(path for path in paths if os.path.lexists(path))
        self._todo = sum(map(_size, objects))
        self._drop(results, self._lost(objects))
        self._lacks(results)
        self._people([plan])
        return self.seen

    def _plans(self, recipes: list[str]) -> Iterator[Plan]:
        """Plan every recipe for itself; one that has mistakes has no say in what the cache holds."""
        for name in recipes:
            with suppress(ForgeError):
                self.session.open_recipes([name])
                yield self.session.plan([i for i, node in self.session.graph.nodes.items() if node.recipe.name == name])

    # -- the cache -------------------------------------------------------------------------------------------------

    def _under(self, kind: str, pattern: str) -> list[Path]:
        folder = self.store.root / kind
        return sorted(folder.glob(pattern)) if folder.is_dir() else []

    def _judge(self, path: Path, look: Callable[[Path], object]) -> bool:
        """Say whether an entry is sound; one at which a look raises ValueError is set aside."""
        try:
            look(path)
        except FileNotFoundError:  # cleaned away meanwhile
            return True
        except ValueError as error:
            self.seen.damages.append(Damage(path, str(error)))
            damaged(path, self.store.root / "quarantine", str(error))
            return False
        return True

    def _lost(self, objects: list[Path]) -> set[str]:
        """Return the names of the objects that are damaged."""
        return {path.name for path in objects if not self._judge(path, self._check_object)}

    def _check_object(self, path: Path) -> None:
        if self._digest(path) != path.name:
            raise ValueError("its bytes are not what its name says")

    def _state(self, path: Path) -> None:
        """Look at a train state and at its description."""
        described: dict[str, Any] = {}

        def read(found: Path) -> None:
            described.update(described_in(read_entry(found)))

        def compare(found: Path) -> None:
            if self._digest(found) != described["sha256"]:
                raise ValueError(CHANGED)

        if self._judge(path, read) and described:
            self._judge(path.with_suffix(".safetensors"), compare)

    def _drop(self, results: list[Result], lost: set[str]) -> None:
        """Drop the results of which something is damaged, as a build does, and say whose they are."""
        whose: dict[str, list[str]] = {}
        for result in results:
            for name in result.needs() & lost:
                whose.setdefault(name, []).append(str(result.record.get("target", "")) or result.key[:12])
            if result.needs() & lost:
                self.store.drop(result, "what it rests on is damaged")
        self.seen.damages = [replace(d, lost=tuple(whose.get(d.path.name, ()))) for d in self.seen.damages]

    def _lacks(self, results: list[Result]) -> None:
        """Name what results that are in use lack altogether."""
        for result in results:
            for name in sorted(result.needs()):
                # that a source has changed is no damage
                was_source = self.store.index.read("digests", "sha256 = ?", [name])
                if not self.store.find(name) and not was_source:
                    whose = str(self.store.record(result).get("target", "")) or result.key[:12]
                    self.seen.damages.append(Damage(self.store.object(name), "it is not there", (whose,)))

    # -- what is not ours ------------------------------------------------------------------------------------------

    def _people(self, plans: list[Plan]) -> None:
        """Look at sources that nobody has touched since they were read, and at what was written to `out/`."""
        outputs = self.session.outputs
        for plan in plans:
            for step in plan.steps.values():
                if step.result is None or not step.node.target.placed:
                    continue
                for file, name in outputs.names(step).items():
                    path = outputs.folder(step) / name
                    if os.path.lexists(path) and self._digest_or_none(path) != step.result.files[file][0]:
                        self.seen.damages.append(Damage(path, "it is not what was written there"))
        for place in sorted(self.session.sources.looked_at()):
            path = Path(place)
            expected = self.store.seen.known_digest(path.absolute()) if path.is_file() else ""
            if expected and self._digest_or_none(path) != expected:
                self.seen.damages.append(Damage(path, "its bytes have changed, and its times have not"))

    # -- bytes -----------------------------------------------------------------------------------------------------

    def _digest_or_none(self, path: Path) -> str | None:
        try:
            return self._digest(path)
        except (ValueError, ForgeError):
            return None

    def _digest(self, path: Path) -> str:
        """Return a file's sha256. Raises ValueError for what is no file."""
        if path.is_symlink():
            raise ValueError("a link lies in its place")
        try:
            fd = open_regular(path)
        except ForgeError as error:
            if not os.path.lexists(path):
                raise FileNotFoundError(path) from None
            raise ValueError("what lies in its place is no file") from error
        whole, place = hashlib.sha256(), 0
        try:
            while chunk := os.pread(fd, CHUNK, place):
                whole.update(chunk)
                place += len(chunk)
                self.session.sources.progress("the cache", self.seen.bytes + place, max(self._todo, 1))
        finally:
            os.close(fd)
        self.seen.bytes += place
        self.seen.files += 1
        return whole.hexdigest()


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def verify(session: Session, names: list[str], *, as_json: bool) -> int:
    """Say what is damaged; return 3 if anything is. Raises RecipeError, UsageError for targets that there are not."""
    began = time.monotonic()
    with _undisturbed(session):
        verifier = Verifier(session)
        seen = verifier.targets(names) if names else verifier.everything()
    spent = time.monotonic() - began
    if as_json:
        for found in seen.damages:
            row = {"path": _shown(session, found.path), "reason": found.reason, "lost": list(found.lost)}
            print(json.dumps({"v": 1, "event": "damaged", **row}))
        counts = {"files": seen.files, "bytes": seen.bytes, "damaged": len(seen.damages)}
        print(json.dumps({"v": 1, "event": "result", **counts, "seconds": round(spent, 3)}))
        return 3 if seen.damages else 0
    for found in seen.damages:
        _say(f"  {glyphs()['failed']} {_shown(session, found.path)}: {found.reason}")
        if found.lost:
            _say(f"      with it {', '.join(found.lost)} is lost")
    verdict = f"{len(seen.damages)} damaged" if seen.damages else "all is as it was written"
    _say(f"  {seen.files} files, {size(seen.bytes)} in {seconds(spent)}: {verdict}")
    if any(session.store.root in found.path.parents for found in seen.damages):
        _say("  damaged entries lie in the cache's quarantine/ now; `forge build` makes again what it needs of them")
    return 3 if seen.damages else 0


@contextmanager
def _undisturbed(session: Session) -> Iterator[None]:
    """Keep clean-ups out meanwhile; where nobody can write to the cache there are none."""
    with ExitStack() as stack:
        with suppress(OSError, ResourceError):
            if (session.store.root / "locks").is_dir():
                stack.enter_context(session.store.guard()).share(wait=True)
        yield


def _shown(session: Session, path: Path) -> str:
    for folder in (session.project.root, session.store.root.parent):
        if path.is_relative_to(folder):
            return str(path.relative_to(folder))
    return str(path)


def _say(text: str) -> None:
    print(safe(text, sys.stdout))
