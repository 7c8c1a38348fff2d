"""A recipe file → `Recipe`: typed, complete, with every mistake found at its place.

What is read here depends on the file alone, so it is kept in a cache by the file's digest and the fingerprint of our
code. Names are linked across files in `graph`.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

from sdforge.complaints import explain, secrets_in
from sdforge.errors import Place, Problem, RecipeError, UsageError, counted, nearest
from sdforge.identity import canonical
from sdforge.implicit import Implicit
from sdforge.method import BY_PRESET, Role, Signature, called_elsewhere, is_target, method, method_groups
from sdforge.names import hint_at_name, is_name, is_reference
from sdforge.syntax import Document, read_toml
from sdforge.target import EXPORT, PREVIEWS, Target, Use, alike
from sdforge.variants import Axis, Variants, edges, read_variants, split, varied

if TYPE_CHECKING:
    from pydantic import BaseModel

NAMING = ("checkpoint", "insert", "bake", "sidecars")  # settings of [preset] whose values name artifacts
RESERVED = ("family", "description", "seed", "source", "dataset", "preset", "checks", "variant", "sweep")


@dataclass(frozen=True)
class Recipe:
    """All that one recipe file says, or a variant of it.

    variants: name → {path: value} of what each changes, those of sweeps too; sweeps: name → axes. Of a variant, shared:
    the targets that are those of the plain recipe, since nothing behind them changes, or of an earlier cell of its
    sweep → that one's name; equal: whether nothing at all changes but names.
    """

    name: str
    file: str
    family: str
    description: str
    targets: dict[str, Target]
    sources: dict[str, dict[str, Any]]
    datasets: dict[str, dict[str, Any]]
    preset: dict[str, Any] | None = None
    signatures: dict[str, Signature] = field(default_factory=dict)
    variants: dict[str, dict[tuple[str, ...], Any]] = field(default_factory=dict)
    sweeps: dict[str, tuple[Axis, ...]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    equal: bool = False

    @property
    def home(self) -> str:
        """The name of the recipe that this is a variant of, or its own."""
        return split(self.name)[0]

    def id(self, target: str) -> str:
        """Return how a target is called in the whole project, whichever recipe it is shared with."""
        return f"{self.shared.get(target, self.name)}:{target}"

    def dump(self) -> str:
        """Return the recipe as JSON, for the cache of what was read."""
        targets = [
            [
                t.name,
                t.signature.name,
                t.settings,
                [[u.role, u.reference, u.use] for u in t.uses],
                t.seed,
                t.raw,
                t.path,
            ]
            for t in self.targets.values()
        ]
        signatures = {name: asdict(s) for name, s in self.signatures.items()}
        rest = [self.name, self.file, self.family, self.description, self.sources, self.datasets, self.preset]
        variants = [[name, list(changes.items())] for name, changes in self.variants.items()]
        sweeps = [[name, [[axis.path, axis.values] for axis in axes]] for name, axes in self.sweeps.items()]
        vary = [variants, sweeps, self.shared, self.equal]
        return json.dumps([signatures, targets, rest, vary], separators=(",", ":"))

    @staticmethod
    def load(text: str) -> Recipe:
        """Return the recipe that `dump` wrote."""
        signatures_, targets_, rest, (variants, sweeps, shared, equal) = json.loads(text)
        name, file, family, description, sources, datasets, preset = rest
        signatures = {key: _signature(value) for key, value in signatures_.items()}
        targets = {
            row[0]: Target(
                row[0], signatures[row[1]], row[2], tuple(Use(*u) for u in row[3]), row[4], row[5], tuple(row[6])
            )
            for row in targets_
        }
        return Recipe(
            name,
            file,
            family,
            description,
            targets,
            sources,
            datasets,
            preset,
            signatures,
            {name: {tuple(path): value for path, value in changes} for name, changes in variants},
            {name: tuple(Axis(tuple(path), tuple(values)) for path, values in axes) for name, axes in sweeps},
            shared,
            equal,
        )


class FaultyRecipe(RecipeError):
    """All that is wrong in one recipe. rest: what could be read of it all the same."""

    def __init__(self, problems: list[Problem], rest: Recipe) -> None:
        super().__init__(problems)
        self.rest = rest


def _signature(value: dict[str, Any]) -> Signature:
    def pair(widened: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
        reads, facts = widened
        return tuple(reads), tuple(facts)

    roles = {
        name: Role(
            r["kind"],
            tuple(r["reads"]),
            tuple(r["facts"]),
            tuple(r["moves"]),
            r["many"],
            tuple(r["also"]),
            {other: pair(widened) for other, widened in r["widens"].items()},
        )
        for name, r in value.pop("roles").items()
    }
    return Signature(roles=roles, **value)


def _guessed(signature: Signature, raw: dict[str, Any]) -> tuple[Use, ...]:
    """Return the names in a table that does not hold, as far as they can be told."""
    uses: list[Use] = []
    for role, spec in signature.roles.items():
        value: Any = raw.get(role)
        names: list[Any] = []
        if not spec.many:
            names = [value]
        elif isinstance(value, list if spec.many == "list" else dict):
            names = list(value)
        uses += [Use(role, name) for name in names if isinstance(name, str) and is_reference(name)]
    return tuple(uses)


def read_recipe(source: bytes, name: str, file: str) -> Recipe:
    """Read a recipe, or (`RECIPE@NAME`) a variant of it.

    Raises RecipeError (FaultyRecipe, where the text is TOML) with all that is wrong, also in variants, warnings too.
    """
    document = read_toml(source, file)
    home, variant = split(name)
    plain = _Reading(document, home)
    recipe, found = plain.recipe(), plain.variants()
    if variant and not plain.problems:
        return _vary(recipe, document, variant, found)
    for each, changes in found.changes.items():
        other = _Reading(varied(document, changes, RESERVED), f"{home}@{each}")
        other.recipe()
        plain.problems += [problem for problem in other.problems if problem not in plain.problems]
    if plain.problems:
        raise FaultyRecipe(plain.problems, plain.rest(recipe))
    told = {each: {change.path: change.value for change in changes} for each, changes in found.changes.items()}
    return replace(recipe, variants=told, sweeps=found.sweeps)


def _vary(plain: Recipe, document: Document, variant: str, found: Variants) -> Recipe:
    """Return a variant of a recipe, and with whom it shares which of its targets.

    The cells of a sweep are compared with each other, and draw no bases.
    """
    text = varied(document, found.changes[variant], RESERVED)
    swept = variant.rpartition("-")[0] in found.sweeps
    recipe = _Reading(text, f"{plain.name}@{variant}", compared=not swept).recipe()
    shared: dict[str, str] = {}
    for other in (plain, *(_vary(plain, document, cell, found) for cell in edges(variant, found.sweeps))):
        own = {name for name, target in recipe.targets.items() if target.signature.group == "checks"}
        for name in _same(recipe, other) - own - {EXPORT, PREVIEWS}:
            shared.setdefault(name, other.shared.get(name, other.name))
    equal = all(alike(target, plain.targets.get(name)) for name, target in recipe.targets.items())
    return replace(recipe, shared=shared, equal=equal)


def _same(recipe: Recipe, other: Recipe) -> set[str]:
    """Return the targets that are alike in two recipes, and so is all behind them."""
    targets = recipe.targets
    differ = {name for name, target in targets.items() if not alike(target, other.targets.get(name))}
    while behind := {
        name
        for name, target in targets.items()
        if name not in differ and any(use.reference in differ for use in target.uses)
    }:
        differ |= behind
    return targets.keys() - differ


def place_in(source: bytes, name: str, file: str, *path: str | int, value: bool = False) -> Place:
    """Return where something stands in a recipe that could be read; name: the recipe's, maybe a variant's."""
    return _document(source, name, file).place(*path, value=value)


@lru_cache(4)  # a recipe may hold thousands of mistakes, and each has its place
def _document(source: bytes, name: str, file: str) -> Document:
    document = read_toml(source, file)
    home, variant = split(name)
    if variant:
        document = varied(document, _Reading(document, home).variants().changes[variant], RESERVED)
    return document


class _Reading:
    """One pass over a document, collecting problems. compared: whether bases are drawn beside the preset."""

    def __init__(self, document: Document, name: str, *, compared: bool = True) -> None:
        self.document = document
        self.name = name
        self.compared = compared
        self.problems: list[Problem] = []
        self.targets: dict[str, Target] = {}
        self.signatures: dict[str, Signature] = {}
        self.named: list[tuple[str, str]] = []  # the paths of all that has a name, also where its table is wrong
        self.seed = 0

    def wrong(self, code: str, message: str, *path: str | int, hint: str = "", value: bool = False) -> None:
        self.problems.append(Problem(code, message, self.document.place(*path, value=value), hint))

    def recipe(self) -> Recipe:
        """Return what could be read; what is wrong is in `problems`."""
        from sdforge.families import family_names
        from sdforge.tables import Dataset, Preset, Source

        values = self.document.values
        family = values.get("family")
        if family is None:
            self.wrong("missing", "the recipe does not say its `family`", hint=f"one of {', '.join(family_names())}")
        elif family not in family_names():
            guess = nearest(str(family), family_names())
            hint = f"did you mean {guess!r}?" if guess else f"known: {', '.join(family_names())}"
            self.wrong("family", f"there is no family {family!r}", "family", hint=hint, value=True)
        seed = values.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**53:
            self.wrong("setting", "`seed` is a whole number from 0", "seed", value=True)
        else:
            self.seed = seed
        description = values.get("description", "")
        if not isinstance(description, str):
            self.wrong("setting", "`description` is text", "description", value=True)
        sources = self._named("source", Source)
        datasets = self._named("dataset", Dataset)
        stated = [(("source", name, "from"), table.from_) for name, table in sources.items()]
        self.problems += secrets_in(stated, self.document)
        self._methods()
        preset = self._preset(Preset, values["preset"]) if "preset" in values else None
        self._names()
        implicit = Implicit(self.name, preset, dict(self.targets), self.wrong, compared=self.compared)
        for each in chain(implicit.of_preset(), implicit.of_checks(values.get("checks", {}))):
            self._target(*each)
        return Recipe(
            self.name,
            self.document.file,
            str(family),
            str(description),
            self.targets,
            {name: table.model_dump(by_alias=True) for name, table in sources.items()},
            {name: table.model_dump(by_alias=True) for name, table in datasets.items()},
            preset.model_dump() if preset is not None else None,
            self.signatures,
        )

    def variants(self) -> Variants:
        """Read what varies, once the recipe itself is read."""
        values = self.document.values
        if not isinstance(values.get("preset", {}), dict):
            return Variants({}, {})
        methods = [tables for name, tables in values.items() if name not in RESERVED and isinstance(tables, dict)]
        targets = {name for tables in methods for name, table in tables.items() if isinstance(table, dict)}
        found, problems = read_variants(self.document, targets, RESERVED)
        self.problems += problems
        return found

    def rest(self, recipe: Recipe) -> Recipe:
        """Return what could be read, so that names in it are looked up too: whatever has a name counts as there."""
        tables = [table for table in self.document.values.values() if isinstance(table, dict)]
        unread: dict[str, Any] = {
            name: {} for table in tables for name in table if name not in recipe.targets | recipe.datasets
        }
        return replace(recipe, sources=unread | recipe.sources)

    def _named(self, key: str, model: type[BaseModel]) -> dict[str, Any]:
        """Read `[key.name]` tables."""
        tables = self.document.values.get(key, {})
        if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
            self.wrong("setting", f"`{key}` is written as tables, [{key}.NAME]", key)
            return {}
        self.named += [(key, name) for name in tables]
        found = {name: self._table(model, table, (key, name)) for name, table in tables.items()}
        return {name: table for name, table in found.items() if table is not None}

    def _table(self, model: type[BaseModel], table: Any, path: tuple[str, ...]) -> Any:
        """Check a table against its model; None (and problems) where it does not hold."""
        from pydantic import ValidationError

        if not isinstance(table, dict):
            self.wrong("setting", f"`{'.'.join(path)}` is a table", *path)
            return None
        try:
            return model.model_validate(table)
        except ValidationError as error:
            self.problems += list(explain(error, model, self.document, path))
            return None

    def _preset(self, model: type[BaseModel], table: Any) -> Any:
        """Check `[preset]`; of one that does not hold return what it names, so that those names are looked up too."""
        from pydantic import ValidationError

        found = self._table(model, table, ("preset",))
        if found is None and isinstance(table, dict):
            for kept in (NAMING, NAMING[:1]):
                with suppress(ValidationError):
                    return model.model_validate({key: table[key] for key in kept if key in table})
        return found

    def _methods(self) -> None:
        groups = method_groups()
        for name, tables in self.document.values.items():
            if name in RESERVED:
                continue
            if name not in groups:
                kind = "method" if isinstance(tables, dict) else "setting"
                guess, here = nearest(name, [*groups, *RESERVED]), called_elsewhere(name)
                hint = f"did you mean `{guess}`?" if guess else "`forge list --methods` names them"
                hint = f"what other programs call so is `{here}` here" if here else hint
                self.wrong(f"unknown-{kind}", f"there is no {kind} `{name}`", name, hint=hint)
                continue
            if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
                self.wrong("setting", f"a target is written as a table, [{name}.NAME]", name)
                continue
            if not is_target(name):
                owner = "preset" if name in BY_PRESET else f"checks.{name}.NAME"
                self.wrong("setting", f"`{name}` belongs to [{owner}]", name)
                continue
            for target, table in tables.items():
                self.named.append((name, target))
                self._target(target, name, table, (name, target))

    def _target(self, name: str, method_name: str, raw: dict[str, Any], path: tuple[str, ...]) -> None:
        found = method(method_name)
        self.signatures[method_name] = found.signature
        table = self._table(found.table, raw, path)
        if table is None:
            self.targets[name] = Target(name, found.signature, "", _guessed(found.signature, raw), None, raw, path)
            return
        if found.group == "merges":
            self._check_counts(table, path)
        uses = []
        for role, spec in found.signature.roles.items():
            value = getattr(table, role)
            if spec.many == "table":
                uses += [Use(role, ref, use.model_dump(exclude_none=True)) for ref, use in value.items()]
            elif spec.many == "list":
                uses += [Use(role, ref) for ref in value]
            elif value is not None:
                uses.append(Use(role, value))
        seed = None
        if found.signature.seeded:
            seed = self.seed if table.seed is None else table.seed
        settings = canonical(table.settings())
        self.targets[name] = Target(name, found.signature, settings, tuple(uses), seed, raw, path)

    def _check_counts(self, table: Any, path: tuple[str, ...]) -> None:
        """A merge that takes any number of checkpoints wants a number for each of them, everywhere."""
        from sdforge.method import per_block

        varies = per_block(table)
        lists: dict[tuple[str, ...], Any] = {(varies,): getattr(table, varies, None)}
        lists |= {("blocks", pattern): value for pattern, value in getattr(table, "blocks", {}).items()}
        count = len(getattr(table, "checkpoints", ()))
        for place, value in lists.items():
            if isinstance(value, list) and value and len(value) != count:
                message = f"{counted(len(value), 'number')} for {counted(count, 'checkpoint')}"
                hint = "the base has none" if hasattr(table, "base") and len(value) == count + 1 else ""
                self.wrong("setting", message, *path, *place, value=True, hint=hint)

    def _names(self) -> None:
        """Names are well-formed, not reserved, and unique over targets, sources and data sets."""
        seen: dict[str, tuple[str, ...]] = {}
        for path in self.named:
            name = path[-1]
            if not is_name(name):
                self.wrong("name", f"`{name}` is no name", *path, hint=hint_at_name(name))
            elif name in RESERVED:
                self.wrong("name", f"`{name}` is a reserved word", *path)
            elif name in seen:
                other = self.document.place(*seen[name])
                self.wrong("name", f"`{name}` is already the name of something in line {other.line}", *path)
            seen[name] = path


def check_name(name: str) -> None:
    """Refuse a recipe's file name that no command line could name. Raises UsageError."""
    if not is_name(name):
        raise UsageError(f"{name!r} is no name for a recipe", hint=hint_at_name(name))
