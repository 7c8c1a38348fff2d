"""The targets that `[preset]` and `[checks]` stand for, as tables that a recipe might have written out.

A preset becomes `preset.insert`, `preset.bake`, `preset.steer`, `preset.cast`, `preset.export` and `preset.previews`,
as far as it needs them; a `[checks.KIND.NAME]` becomes `check.NAME`, with what is drawn for it alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from sdforge.errors import nearest
from sdforge.method import method, method_groups
from sdforge.names import hint_at_name, is_name
from sdforge.target import EXPORT, PREVIEWS, Target

LAST = ("aesthetic",)  # kinds that are baked after the others
GIVEN = ("pictures", "without", "at_zero")  # inputs of checks that no recipe states: they follow from [preset]
MOST_BASES = 4  # that are drawn beside a preset


class Wrong(Protocol):
    """Whom a mistake is told: a code, a sentence, the path in the file."""

    def __call__(self, code: str, message: str, *path: str | int, hint: str = "", value: bool = False) -> None: ...


class Table(NamedTuple):
    """A target's table. path: where in the file it comes from."""

    name: str
    method: str
    raw: dict[str, Any]
    path: tuple[str, ...] = ("preset",)


class Implicit:
    """What one recipe's preset and checks stand for.

    name: the recipe's; preset: None where there is none; targets: those that the recipe writes out; compared: whether
    bases are drawn beside the preset.
    """

    def __init__(
        self, name: str, preset: Any, targets: Mapping[str, Target], wrong: Wrong, *, compared: bool = True
    ) -> None:
        self.name, self.preset, self.targets, self.wrong, self.compared = name, preset, targets, wrong, compared
        self._checks: set[str] = set()  # the names of those that there are

    def of_preset(self) -> Iterator[Table]:
        """Yield what leads from the preset's checkpoint to its files and previews."""
        preset = self.preset
        if preset is None:
            return
        checkpoint, tables = self._chain(preset, "preset")
        self._refuse_twice()
        artifacts, bases = self._behind()
        yield from tables
        yield Table(
            EXPORT,
            "export",
            {
                "checkpoint": checkpoint,
                **{role: {name: {} for name in names} for role, names in artifacts.items()},
                "sidecars": {name: {} for name in preset.sidecars},
                "forms": sorted(set(preset.export)),
                "title": preset.title or self.name,
                "description": preset.description,
                "licence": preset.licence,
                "trigger": preset.trigger,
                "negative_prompt": preset.negative_prompt,
                "clip_skip": preset.clip_skip,
            },
        )
        if preset.previews.prompts:
            unbaked = "preset.insert" if preset.insert else preset.checkpoint
            before = [*bases, *([unbaked] if preset.bake else [])] if self.compared else []
            beside: dict[str, Any] = {name: {} for name in before}
            yield Table(PREVIEWS, "previews", {"checkpoint": checkpoint, "beside": beside, **_drawing(preset)})

    def _chain(self, preset: Any, stem: str) -> tuple[str, list[Table]]:
        """Return the name of the checkpoint that a preset draws with, and the tables of what leads to it.

        stem: how the names of those targets begin.
        """
        checkpoint = preset.checkpoint
        tables: list[Table] = []

        def add(name: str, method_name: str, raw: dict[str, Any]) -> str:
            tables.append(Table(f"{stem}.{name}", method_name, {"checkpoint": checkpoint, **raw}))
            return f"{stem}.{name}"

        if preset.insert:
            checkpoint = add("insert", "insert", {"embeddings": {name: {} for name in preset.insert}})
        baked = self._routed("bake", list(preset.bake), "loras")
        # what steers a text encoder was made for the words as they are in the end
        roles = method("bake").signature.roles
        last = {role: names for role, names in baked.items() if roles[role].kind in LAST}
        for name, routed in (("bake", {role: n for role, n in baked.items() if role not in last}), ("steer", last)):
            if routed:
                strengths = {role: {n: {"strength": preset.bake[n]} for n in names} for role, names in routed.items()}
                dtype = "" if name == "bake" and last else preset.dtype  # rounded once, at the end
                checkpoint = add(name, "bake", {**strengths, "dtype": dtype})
        if preset.dtype:
            checkpoint = add("cast", "cast", {"dtype": preset.dtype})
        return checkpoint, tables

    def of_checks(self, tables: Any) -> Iterator[Table]:
        """Yield what looks at the previews, and what is drawn for it besides. tables: `[checks]` as it was written."""
        kinds = sorted(name for name, group in method_groups().items() if group == "checks")
        if not isinstance(tables, dict) or not all(isinstance(named, dict) for named in tables.values()):
            self.wrong("setting", "a check is written as a table, [checks.KIND.NAME]", "checks")
            return
        if tables and (self.preset is None or not self.preset.previews.prompts):
            hint = "[preset.previews] with `prompts` draws some"
            self.wrong("checks", "checks look at previews, and nothing draws any", "checks", hint=hint)
            return
        for kind, named in tables.items():
            if kind not in kinds:
                guess = nearest(kind, kinds)
                hint = f"did you mean `{guess}`?" if guess else f"there are {', '.join(kinds)}"
                self.wrong("unknown-method", f"there is no check `{kind}`", "checks", kind, hint=hint)
                continue
            for name, table in named.items():
                yield from self._check(kind, name, table)

    def _check(self, kind: str, name: str, table: Any) -> Iterator[Table]:
        path, target = ("checks", kind, name), f"check.{name}"
        if not is_name(name):
            self.wrong("name", f"`{name}` is no name", *path, hint=hint_at_name(name))
        elif target in self._checks:
            self.wrong("name", f"`{name}` is already the name of a check", *path)
        elif not isinstance(table, dict):
            self.wrong("setting", f"a check is written as a table, [checks.{kind}.NAME]", *path)
        elif given := next((key for key in table if key in GIVEN), ""):
            self.wrong("unknown-setting", f"`{given}` is no setting of {'.'.join(path)}", *path, given)
        elif kind == "effect" and isinstance(table.get("of"), str):
            yield from self._effect(target, table, path)
        else:
            self._checks.add(target)
            yield Table(target, kind, table, path)

    def _effect(self, target: str, table: dict[str, Any], path: tuple[str, ...]) -> Iterator[Table]:
        """Yield an effect's check, and what draws the preset without the artifact and with its strength at 0."""
        name, preset = table["of"], self.preset
        if name not in [*preset.insert, *preset.bake, *preset.sidecars]:
            guess = nearest(name, [*preset.insert, *preset.bake, *preset.sidecars])
            hint = f"did you mean `{guess}`?" if guess else "what shows must be in `bake`, `insert` or `sidecars`"
            self.wrong("unknown-name", f"[preset] does not take `{name}`", *path, "of", hint=hint, value=True)
            return
        self._checks.add(target)
        yield from self._drawn(preset.model_copy(update=_left_out(preset, name)), f"{target}.without")
        drawn = {"without": f"{target}.without.pictures"}
        if name in preset.bake:
            at_zero = preset.model_copy(update={"bake": preset.bake | {name: 0.0}})
            yield from self._drawn(at_zero, f"{target}.zero")
            drawn["at_zero"] = f"{target}.zero.pictures"
        yield Table(target, "effect", table | drawn, path)

    def _drawn(self, preset: Any, stem: str) -> Iterator[Table]:
        """Yield what draws another preset with the same prompts and seeds."""
        checkpoint, tables = self._chain(preset, stem)
        yield from tables
        yield Table(f"{stem}.pictures", "previews", {"checkpoint": checkpoint, **_drawing(preset)})

    def _routed(self, method_name: str, names: list[str], otherwise: str) -> dict[str, list[str]]:
        """Return role of a method → the names that belong there, by what this recipe's targets make.

        otherwise: the role of names that are no targets of this recipe, or belong nowhere.
        """
        roles = method(method_name).signature.roles
        by_kind = {role.kind: name for name, role in roles.items() if role.many == "table" and not role.also}
        found: dict[str, list[str]] = {}
        for name in names:
            target = self.targets.get(name)
            role = by_kind.get(target.signature.makes, otherwise) if target else otherwise
            found.setdefault(role, []).append(name)
        return found

    def _refuse_twice(self) -> None:
        preset = self.preset
        for i, name in enumerate(preset.sidecars):
            place, hint = ("preset", "sidecars", i), "it would act twice"
            if name in preset.bake:
                self.wrong("setting", f"`{name}` is baked and a sidecar", *place, hint=hint, value=True)
            elif name in preset.sidecars[:i]:
                self.wrong("setting", f"`{name}` is a sidecar twice", *place, hint=hint, value=True)

    def _behind(self) -> tuple[dict[str, list[str]], list[str]]:
        """Return what lies behind the preset in this recipe: export's roles → artifacts, and bases.

        What is baked and nobody makes, a source, is among them where the preset exports files of its kind.
        """
        preset = self.preset
        kinds = {role.kind: name for name, role in method("bake").signature.roles.items() if name != "checkpoint"}
        baked = dict.fromkeys(preset.bake, "loras")  # name → role, of sources
        embeddings, bases = list(preset.insert), []
        queue, seen = [preset.checkpoint], set()
        while queue:
            name = queue.pop(0)
            if name in seen:
                continue
            seen.add(name)
            target = self.targets.get(name)
            if target is None:
                bases.append(name)
                continue
            for use in target.uses:
                kind = target.signature.roles[use.role].kind
                if kind == "checkpoint":
                    queue.append(use.reference)
                elif kind in kinds:
                    baked.setdefault(use.reference, kinds[kind])
                elif kind == "embedding" and not (use.use or {}).get("over"):
                    embeddings.append(use.reference)
        made = [name for name in baked if name in self.targets or ":" in name]
        routed = {"embeddings": list(dict.fromkeys(embeddings))} | self._routed("export", made, "loras")
        for name, role in baked.items():
            form = role.replace("_", "-")
            if name not in made and any(each == form or each.startswith(f"{form}-") for each in preset.export):
                routed.setdefault(role, []).append(name)
        return routed, bases[:MOST_BASES]


def _drawing(preset: Any) -> dict[str, Any]:
    """Return how a preset's previews are drawn."""
    drawing: dict[str, Any] = preset.previews.model_dump(exclude_unset=True)
    drawing.setdefault("negative_prompt", preset.negative_prompt)
    drawing.setdefault("clip_skip", preset.clip_skip)
    return drawing | {"sidecars": {name: {} for name in preset.sidecars}}


def _left_out(preset: Any, name: str) -> dict[str, Any]:
    """Return what a preset takes, without one artifact."""
    return {
        "insert": [each for each in preset.insert if each != name],
        "bake": {each: strength for each, strength in preset.bake.items() if each != name},
        "sidecars": [each for each in preset.sidecars if each != name],
    }
