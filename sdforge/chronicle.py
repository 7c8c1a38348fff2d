"""What is remembered of a project's builds: one record a recipe, in the cache's index.

    {"v": 1,
     "keys":   {"RECIPE:TARGET": KEY, …}      plan keys of all that it takes, as it was last made
     "before": {"RECIPE:TARGET": KEY, …}      the same before the last build that changed one of them
     "builds": [CHAPTER, CHAPTER]             of its preset, the last one first, as far as they came out differently
     "passed": [[KEY, DIGEST, COLUMN], …]}    previews of the last builds that passed the checks, the last one first

    CHAPTER: {"made": SECONDS, "recipe": TEXT, "pictures": [KEY, DIGEST, COLUMN] or null,
              "steps": {"RECIPE:TARGET": {"key": KEY, "digest": DIGEST, "state": STATE, "why": TEXT}, …}}

None of it decides a result but a check's that compares with the build before. It is lost with the index, and what
another version wrote counts as lost: then there is nothing to compare with, and everything else goes on.

In a cache of its own a project's records are found wherever its folder is. In a shared one they stand under the name of
its folder; `out/.project` says under which one it was built last, so that they go along when it is moved or copied.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sdforge.drawn import Pictures
from sdforge.errors import ResourceError
from sdforge.index import Index
from sdforge.store import called
from sdforge.store.files import publish_bytes, read_entry, sweep_parts

TOLD = ".project"  # in `out/`, which git ignores
VERSION = 1  # of the record's format: raised, what is there is forgotten
MOST = 2  # builds that are remembered, and previews that passed


@dataclass(frozen=True)
class Did:
    """What a build did about a target. state: `built`, `fetched`, `restored` or `reused`; why: the reason in short."""

    key: str
    digest: str
    state: str
    why: str = ""


@dataclass(frozen=True)
class Chapter:
    """One build of a preset.

    made: seconds since 1970; recipe: its text; steps: id → what was done about it; pictures: the previews, if it drew
    any.
    """

    made: float
    recipe: str
    steps: dict[str, Did] = field(default_factory=dict)
    pictures: Pictures | None = None

    def same_as(self, other: Chapter) -> bool:
        """Say whether both builds came out alike."""
        return self._results() == other._results()

    def _results(self) -> dict[str, tuple[str, str]]:
        return {identifier: (did.key, did.digest) for identifier, did in self.steps.items()}


@dataclass(frozen=True)
class Past:
    """What is remembered of one recipe: see above."""

    keys: dict[str, str] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)
    builds: tuple[Chapter, ...] = ()
    passed: tuple[Pictures, ...] = ()

    def with_keys(self, keys: dict[str, str]) -> Past:
        """Return this after a build that made, or reused, targets with these plan keys."""
        now = self.keys | keys
        return self if now == self.keys else replace(self, keys=now, before=self.keys)

    def with_build(self, chapter: Chapter) -> Past:
        """Return this after a build of the preset; one that made the same as the last one is no other build."""
        if self.builds and chapter.same_as(self.builds[0]):
            return self
        return replace(self, builds=(chapter, *self.builds[: MOST - 1]))

    def with_passed(self, pictures: Pictures, *, unchecked: bool) -> Past:
        """Return this after a build whose previews passed the checks.

        unchecked: they were asked for without them. Somebody wants those as they are: nothing before counts any more.
        """
        rest = () if unchecked else tuple(each for each in self.passed if each != pictures)[: MOST - 1]
        if pictures in self.passed[:1] and not unchecked:
            return self
        return replace(self, passed=(pictures, *rest))

    def dump(self) -> str:
        """Return the record."""
        return json.dumps({"v": VERSION, **asdict(self)}, separators=(",", ":"))

    @staticmethod
    def load(text: str) -> Past:
        """Return what `dump` wrote; nothing of what another version wrote."""
        value = json.loads(text)
        if not isinstance(value, dict) or value.get("v") != VERSION:
            return Past()
        builds = tuple(_chapter(row) for row in value["builds"])
        return Past(value["keys"], value["before"], builds, tuple(Pictures(*row) for row in value["passed"]))


def _chapter(row: dict[str, Any]) -> Chapter:
    steps = {identifier: Did(**did) for identifier, did in row["steps"].items()}
    return Chapter(row["made"], row["recipe"], steps, Pictures(*row["pictures"]) if row["pictures"] else None)


class Chronicle:
    """The records of one project's recipes. root, out: its folder, and where its files are made now."""

    def __init__(self, index: Index, root: Path, out: Path) -> None:
        self.index, self.name = index, called(root)
        self.shared = index.path.parents[1] != root / "cache"
        self.told = out / TOLD
        self._read: dict[str, Past] = {}

    @cached_property
    def before(self) -> str:
        """What the project's folder was called when it was last built with a shared cache, "" where nothing says."""
        return self._told()

    @property
    def moved(self) -> bool:
        """Whether what is remembered stands under another name still."""
        return self.before not in ("", self.name)

    def past(self, recipe: str) -> Past:
        """Return what is remembered of a recipe.

        Where a folder was moved, what stands under its name of now may be older, or another project's.
        """
        if recipe not in self._read:
            rows = self.index.read_keyed("builds", [self._row(recipe), self._row(recipe, self.before)])
            row = rows.get(self._row(recipe, self.before)) or rows.get(self._row(recipe))
            self._read[recipe] = Past.load(row) if row else Past()
        return self._read[recipe]

    def change(self, recipe: str, change: Callable[[Past], Past]) -> None:
        """Change what is remembered of a recipe, whatever another build has entered since it was read."""
        self.before = self._told()  # another build may have settled meanwhile
        if self.shared and self.before != self.name:
            self._settle()
        self._read.pop(recipe, None)
        before = self.past(recipe)
        now = change(before)
        if now != before:
            self.index.put("builds", {self._row(recipe): now.dump()})
            self._read[recipe] = now

    def last_key(self, identifier: str) -> str:
        """Return the plan key with which a target was last made here, or ""."""
        return self.past(identifier.partition(":")[0]).keys.get(identifier, "")

    def _settle(self) -> None:
        """Go on under the name that the folder has now, with all that stands under the one that it had.

        A copy begins with what is remembered of its original; neither sees the other's builds after that.
        """
        if self.moved:
            start = f"{self.before}:"
            rows = self.index.read("builds", "id >= ? AND id < ?", [start, f"{start}\U0010ffff"])
            self.index.put("builds", {self._row(row[0].removeprefix(start)): row[1] for row in rows})
        with suppress(ResourceError):  # where nothing can be written, it is only forgotten with the next move
            sweep_parts(self.told.parent)
            publish_bytes(self.name.encode(), self.told, self.told.parent, 0o644)
        self.before = self.name

    def _told(self) -> str:
        try:
            return read_entry(self.told).decode(errors="replace") if self.shared else ""
        except (OSError, ValueError):
            return ""

    def _row(self, recipe: str, name: str = "") -> str:
        return f"{name or self.name}:{recipe}" if self.shared else recipe
