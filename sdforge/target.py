"""A table of a recipe, as a value: the method that makes it, its settings, the names that it takes, and its place."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from sdforge.method import Role, Signature

EXPORT, PREVIEWS = "preset.export", "preset.previews"  # the targets whose files lie in `out/`


@dataclass(frozen=True, slots=True)
class Use:
    """A name in a target's table. use: how it is used, for roles that say so of each name."""

    role: str
    reference: str
    use: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """A table of a recipe: something to have.

    settings: canonical JSON of what enters the manifest. raw: the table as it was written. seed: None where none
    is needed. path: where it stands in the file.
    """

    name: str
    signature: Signature
    settings: str
    uses: tuple[Use, ...]
    seed: int | None
    raw: dict[str, Any]
    path: tuple[str, ...]

    def role(self, name: str) -> Role:
        """Return a role of the method as it is here: what is given for another one may make more of it matter."""
        found = self.signature.roles[name]
        for other, role in self.signature.roles.items():
            if name in role.widens and any(use.role == other for use in self.uses):
                reads, facts = role.widens[name]
                found = replace(found, reads=(*found.reads, *reads), facts=(*found.facts, *facts))
        return found

    @property
    def implicit(self) -> bool:
        """Whether `[preset]` made it."""
        return self.path == ("preset",)

    @property
    def placed(self) -> bool:
        """Whether what it makes lies in `out/`: a preset's files, and its previews."""
        return self.name in (EXPORT, PREVIEWS)


def alike(a: Target, b: Target | None) -> bool:
    """Say whether two targets are made by the same method with the same settings from inputs of the same names."""
    if b is None or (a.signature.name, _made_from(a), a.seed) != (b.signature.name, _made_from(b), b.seed):
        return False
    return a.settings == b.settings or (a.name == EXPORT and _untitled(a) == _untitled(b))


def _made_from(target: Target) -> list[Use]:
    """Return what a target takes, but for what is only drawn beside a preset."""
    return [use for use in target.uses if target.name != PREVIEWS or use.role != "beside"]


def _untitled(export: Target) -> dict[str, Any]:
    """Return the settings of an export without the title, which is a variant's name where none is stated."""
    return {name: value for name, value in json.loads(export.settings).items() if name != "title"}
