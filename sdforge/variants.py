"""`[variant.NAME]` and `[sweep.NAME]`: a recipe with some settings set otherwise, without a second file.

A variant of recipe R is the recipe `R@NAME`: the same text, in which the settings that it names have other values. A
sweep is as many variants as it lists values, `R@NAME-1`, `R@NAME-2`, …: of one setting, or each value of a first one
with each value of a second one, row by row. What is read of a variant is read as the recipe itself is, so that its
mistakes are found by the same code, at the place in the variant that makes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from sdforge.errors import Problem, nearest
from sdforge.names import hint_at_name, is_name
from sdforge.syntax import Document, Path
from sdforge.toml import dotted, value

MARK = "@"  # between a recipe's name and a variant's
MOST_AXES, MOST_CELLS = 2, 100  # of a sweep
COUNTED = re.compile(r".*-\d+$")  # how the cells of a sweep are called


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that is set otherwise.

    path: begins with a target's name or `preset`; written: where its value stands.
    """

    path: tuple[str, ...]
    value: Any
    written: Path


@dataclass(frozen=True, slots=True)
class Axis:
    """What a sweep goes through: a setting, and its values in order."""

    path: tuple[str, ...]
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Variants:
    """What the variants and sweeps of a recipe say. changes: variant (also of a sweep) → what it changes.

    sweeps: name → its axes, across before down.
    """

    changes: dict[str, tuple[Change, ...]]
    sweeps: dict[str, tuple[Axis, ...]]


def split(name: str) -> tuple[str, str]:
    """Return (recipe, variant) of a recipe's name; the variant is "" of the plain one."""
    recipe, _, variant = name.partition(MARK)
    return recipe, variant


def cells(sweep: str, axes: tuple[Axis, ...]) -> list[str]:
    """Return the variants of a sweep, row by row."""
    count = 1
    for axis in axes:
        count *= len(axis.values)
    return [f"{sweep}-{i + 1}" for i in range(count)]


def edges(variant: str, sweeps: dict[str, tuple[Axis, ...]]) -> list[str]:
    """Return the cells of a sweep of two settings with which one shares a value: first in its column, first in its row.

    They stand for all others; a cell of the first row and column is one of them itself.
    """
    sweep, _, number = variant.rpartition("-")
    axes = sweeps.get(sweep, ())
    if len(axes) < MOST_AXES:
        return []
    width = len(axes[0].values)
    row, column = divmod(int(number) - 1, width)
    return [cell for cell in (f"{sweep}-{column + 1}", f"{sweep}-{row * width + 1}") if cell != variant]


def lines(changes: dict[tuple[str, ...], Any]) -> list[str]:
    """Return settings as the lines of a variant."""
    return [f"{dotted(path)} = {value(found)}" for path, found in changes.items()]


def read_variants(document: Document, targets: set[str], reserved: tuple[str, ...]) -> tuple[Variants, list[Problem]]:
    """Read the variants of a recipe, and all that is wrong with their names, roots and lists.

    Whether a target has such settings is found when the variant itself is read.
    """
    reading = _Reading(document, targets, reserved)
    return Variants(dict(reading.variants()), reading.sweeps), reading.problems


class _Reading:
    def __init__(self, document: Document, targets: set[str], reserved: tuple[str, ...]) -> None:
        self.document, self.targets, self.reserved = document, targets, reserved
        self.roots = targets | ({"preset"} & document.values.keys())
        self.problems: list[Problem] = []
        self.sweeps: dict[str, tuple[Axis, ...]] = {}

    def wrong(self, message: str, path: Path, hint: str = "", *, code: str = "setting", at_value: bool = False) -> None:
        self.problems.append(Problem(code, message, self.document.place(*path, value=at_value), hint))

    def variants(self) -> Iterator[tuple[str, tuple[Change, ...]]]:
        """Yield name → changes of the variants, those of sweeps after the others."""
        for name, table in self._tables("variant"):
            if changes := self._changes(table, ("variant", name)):
                yield name, tuple(changes)
        for name, table in self._tables("sweep"):
            changes = self._changes(table, ("sweep", name))
            listed = [change for change in changes if self._is_list(change)]
            if len(listed) > MOST_AXES:
                at = listed[MOST_AXES].written
                self.wrong(f"a sweep goes through {MOST_AXES} settings at most", at, "a second sweep takes the others")
            elif listed and len(listed) == len(changes):
                yield from self._cells(name, listed)

    def _tables(self, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
        tables = self.document.values.get(kind, {})
        if not isinstance(tables, dict):
            self.wrong(f"`{kind}` is written as tables, [{kind}.NAME]", (kind,))
            return
        for name, table in tables.items():
            if not isinstance(table, dict):
                self.wrong(f"`{kind}` is written as tables, [{kind}.NAME]", (kind, name))
            elif self._is_named(kind, name):
                yield name, table

    def _is_named(self, kind: str, name: str) -> bool:
        """Say whether a name can be a variant's; variants and sweeps share one name space."""
        message, hint = "", ""
        if not is_name(name):
            message, hint = f"`{name}` is no name", hint_at_name(name)
        elif name in self.reserved:
            message = f"`{name}` is a reserved word"
        elif COUNTED.match(name):
            message, hint = f"`{name}` ends in - and digits, as the cells of a sweep do", "give it another name"
        elif kind == "sweep" and name in self.document.values.get("variant", {}):
            message = f"`{name}` is already the name of a variant"
        if message:
            self.wrong(message, (kind, name), hint, code="name")
            return False
        return True

    def _changes(self, table: dict[str, Any], place: tuple[str, str]) -> list[Change]:
        """Return what a table sets; none where a root means nothing."""
        found = [Change(path, leaf, (*place, *path)) for path, leaf in leaves(table)]
        if not found:
            self.wrong(f"`{place[1]}` changes nothing", place, "name a setting: TARGET.SETTING = VALUE")
        return [change for change in found if self._is_rooted(change)]

    def _is_rooted(self, change: Change) -> bool:
        root, *rest = change.path
        if root not in self.roots:
            message = f"`{root}` is no target of this recipe"
            self.wrong(message, change.written, self._way_to(change), code="unknown-name")
        elif not rest:
            self.wrong(f"`{root}` is a target, and one of its settings belongs here", change.written)
        return bool(rest) and root in self.roots

    def _way_to(self, change: Change) -> str:
        """Return what was meant by a path whose root means nothing."""
        root, *rest = change.path
        if rest and rest[0] in self.document.values.get(root, {}):
            kind = "targets are named without their method" if rest[0] in self.targets else "only targets vary"
            return f"{kind}: {dotted(tuple(rest))}" if rest[0] in self.targets else kind
        if root.partition(".")[0] in self.roots:
            return f"the dots stand outside of quotes: {root}"
        guess = nearest(root, [*self.roots])
        return f"did you mean `{guess}`?" if guess else f"there are {', '.join(sorted(self.roots))}"

    def _is_list(self, change: Change) -> bool:
        """Say whether a setting of a sweep lists values, each once."""
        name, listed = dotted(change.path), change.value
        if not isinstance(listed, list) or not listed:
            self.wrong(f"a sweep lists values: `{name}` is none", change.written, f"{name} = [ … ]", at_value=True)
            return False
        for i, one in enumerate(listed):
            if repr(one) in map(repr, listed[:i]):  # true is not 1
                self.wrong(f"`{name}` has this value already", (*change.written, i), at_value=True)
                return False
        return True

    def _cells(self, name: str, changes: list[Change]) -> Iterator[tuple[str, tuple[Change, ...]]]:
        axes = tuple(Axis(change.path, tuple(change.value)) for change in changes)
        names = cells(name, axes)
        if len(names) > MOST_CELLS:
            self.wrong(f"`{name}` has {len(names)} cells; the most is {MOST_CELLS}", ("sweep", name))
            return
        self.sweeps[name] = axes
        for i, cell in enumerate(names):
            row, column = divmod(i, len(axes[0].values))
            yield (
                cell,
                tuple(
                    Change(change.path, change.value[at], (*change.written, at))
                    for change, at in zip(changes, (column, row), strict=False)
                ),
            )


def leaves(table: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield what a table sets: what stands in tables within is set one by one, and what beside it is stays."""
    for name, found in table.items():
        if isinstance(found, dict) and found:
            yield from leaves(found, (*path, name))
        else:
            yield (*path, name), found


def varied(document: Document, changes: tuple[Change, ...], reserved: tuple[str, ...]) -> Document:
    """Return a recipe's document with other settings; each of them is found where the variant says it."""
    values = deepcopy(document.values)
    moved: dict[Path, Path] = {}
    for change in changes:
        table, path = _table_of(values, change.path[0], reserved)
        for part in change.path[1:-1]:
            if not isinstance(table.get(part), dict):
                table[part] = {}
            table, path = table[part], (*path, part)
        table[change.path[-1]] = change.value
        moved[(*path, change.path[-1])] = change.written
    return replace(document, values=values, moved=moved)


def _table_of(values: dict[str, Any], root: str, reserved: tuple[str, ...]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the table that a path's root means, and where it stands."""
    if root == "preset":
        return values.setdefault("preset", {}), ("preset",)
    for method, tables in values.items():
        if method not in reserved and isinstance(tables, dict) and isinstance(tables.get(root), dict):
            return tables[root], (method, root)
    raise LookupError(root)  # `read_variants` lets no other root through
