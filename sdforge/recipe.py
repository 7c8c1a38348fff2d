"""A recipe file → `Recipe`: typed, complete, with every mistake found at its place.

What is read here depends on the file alone, so it is kept in a cache by the file's digest and the fingerprint of our
code. Names are linked across files in `graph`. A `[preset]` becomes targets of its own: `preset.insert`,
`preset.bake`, `preset.steer`, `preset.cast`, `preset.export`, `preset.previews`; a `[checks.KIND.NAME]` becomes
`check.NAME`, with what is drawn for it alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sdforge.errors import Place, Problem, RecipeError, UsageError, counted, nearest
from sdforge.identity import canonical
from sdforge.method import BY_PRESET, Role, Signature, called_elsewhere, is_target, method, method_groups
from sdforge.names import REFERENCE, is_name, is_reference
from sdforge.syntax import Document, read_toml

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

RESERVED = ("family", "description", "seed", "source", "dataset", "preset", "checks", "variant", "sweep")
LATER = ("variant", "sweep")
LAST = ("aesthetic",)  # kinds that are baked after the others
GIVEN = ("pictures", "without", "at_zero")  # inputs of checks that no recipe states: they follow from [preset]


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
        return self.name in ("preset.export", "preset.previews")


@dataclass(frozen=True)
class Recipe:
    """All that one recipe file says."""

    name: str
    file: str
    family: str
    description: str
    targets: dict[str, Target]
    sources: dict[str, dict[str, Any]]
    datasets: dict[str, dict[str, Any]]
    preset: dict[str, Any] | None = None
    signatures: dict[str, Signature] = field(default_factory=dict)

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
        return json.dumps([signatures, targets, rest], separators=(",", ":"))

    @staticmethod
    def load(text: str) -> Recipe:
        """Return the recipe that `dump` wrote."""
        signatures_, targets_, (name, file, family, description, sources, datasets, preset) = json.loads(text)
        signatures = {key: _signature(value) for key, value in signatures_.items()}
        targets = {
            row[0]: Target(
                row[0], signatures[row[1]], row[2], tuple(Use(*u) for u in row[3]), row[4], row[5], tuple(row[6])
            )
            for row in targets_
        }
        return Recipe(name, file, family, description, targets, sources, datasets, preset, signatures)


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
    """Read a recipe. Raises RecipeError with all that is wrong in the file, warnings included."""
    return _Reading(read_toml(source, file), name).recipe()


def place_in(source: bytes, file: str, *path: str | int, value: bool = False) -> Place:
    """Return where something stands in a recipe that could be read."""
    return read_toml(source, file).place(*path, value=value)


class _Reading:
    """One pass over a document, collecting problems."""

    def __init__(self, document: Document, name: str) -> None:
        self.document = document
        self.name = name
        self.problems: list[Problem] = []
        self.targets: dict[str, Target] = {}
        self.signatures: dict[str, Signature] = {}
        self.named: list[tuple[str, str]] = []  # the paths of all that has a name, also where its table is wrong
        self.seed = 0

    def wrong(self, code: str, message: str, *path: str | int, hint: str = "", value: bool = False) -> None:
        self.problems.append(Problem(code, message, self.document.place(*path, value=value), hint))

    def recipe(self) -> Recipe:
        from sdforge.families import family_names
        from sdforge.tables import Dataset, Preset, Source

        values = self.document.values
        family = values.get("family")
        if family is None:
            self.wrong("missing", "the recipe does not say its `family`", hint=f"one of {', '.join(family_names())}")
        elif family not in family_names():
            guess = nearest(str(family), family_names()) or ", ".join(family_names())
            self.wrong("family", f"there is no family {family!r}", "family", hint=f"known: {guess}", value=True)
        seed = values.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**53:
            self.wrong("setting", "`seed` is a whole number from 0", "seed", value=True)
        else:
            self.seed = seed
        description = values.get("description", "")
        if not isinstance(description, str):
            self.wrong("setting", "`description` is text", "description", value=True)
        for key in LATER:
            if key in values:
                self.wrong("later", f"[{key}] comes with a later version of sdforge", key)
        sources = self._named("source", Source)
        datasets = self._named("dataset", Dataset)
        self._methods()
        preset = self._table(Preset, values["preset"], ("preset",)) if "preset" in values else None
        self._names()
        if preset is not None:
            self._expand(preset)
        self._checks(preset)
        recipe = Recipe(
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
        if self.problems:
            raise RecipeError(self.problems, self._rest(recipe))
        return recipe

    def _rest(self, recipe: Recipe) -> Recipe:
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
                self.wrong("name", f"`{name}` is no name", *path, hint="small letters, digits, - and _, at most 64")
            elif name in RESERVED:
                self.wrong("name", f"`{name}` is a reserved word", *path)
            elif name in seen:
                other = self.document.place(*seen[name])
                self.wrong("name", f"`{name}` is already the name of something in line {other.line}", *path)
            seen[name] = path

    def _expand(self, preset: Any) -> None:
        """Turn `[preset]` into targets."""
        checkpoint, steps = self._chain(preset, "preset")
        unbaked = "preset.insert" if preset.insert else preset.checkpoint
        self._refuse_twice(preset)
        artifacts, bases = self._behind(preset)
        export = {
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
        }
        steps.append(("preset.export", "export", export))
        if preset.previews.prompts:
            beside: dict[str, Any] = {name: {} for name in [*bases, *([unbaked] if preset.bake else [])]}
            drawing = {"checkpoint": checkpoint, "beside": beside, **_drawing(preset)}
            steps.append(("preset.previews", "previews", drawing))
        for name, method_name, raw in steps:
            self._target(name, method_name, raw, ("preset",))

    def _chain(self, preset: Any, stem: str) -> tuple[str, list[tuple[str, str, dict[str, Any]]]]:
        """Return the name of the checkpoint that a preset draws with, and (name, method, table) of what leads to it.

        stem: how the names of those targets begin.
        """
        checkpoint = preset.checkpoint
        steps: list[tuple[str, str, dict[str, Any]]] = []

        def add(name: str, method_name: str, table: dict[str, Any]) -> str:
            steps.append((f"{stem}.{name}", method_name, {"checkpoint": checkpoint, **table}))
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
        return checkpoint, steps

    def _checks(self, preset: Any) -> None:
        """Turn `[checks.KIND.NAME]` into targets: what looks at the previews, and what is drawn for it besides."""
        tables = self.document.values.get("checks", {})
        kinds = sorted(name for name, group in method_groups().items() if group == "checks")
        if not isinstance(tables, dict) or not all(isinstance(named, dict) for named in tables.values()):
            self.wrong("setting", "a check is written as a table, [checks.KIND.NAME]", "checks")
            return
        if tables and (preset is None or not preset.previews.prompts):
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
                self._check(preset, kind, name, table)

    def _check(self, preset: Any, kind: str, name: str, table: Any) -> None:
        path, target = ("checks", kind, name), f"check.{name}"
        if not is_name(name):
            self.wrong("name", f"`{name}` is no name", *path, hint="small letters, digits, - and _, at most 64")
        elif target in self.targets:
            self.wrong("name", f"`{name}` is already the name of a check", *path)
        elif not isinstance(table, dict):
            self.wrong("setting", f"a check is written as a table, [checks.{kind}.NAME]", *path)
        elif given := next((key for key in table if key in GIVEN), ""):
            self.wrong("unknown-setting", f"`{given}` is no setting of {'.'.join(path)}", *path, given)
        elif kind == "effect" and isinstance(table.get("of"), str):
            self._effect(preset, target, table, path)
        else:
            self._target(target, kind, table, path)

    def _effect(self, preset: Any, target: str, table: dict[str, Any], path: tuple[str, ...]) -> None:
        """Add an effect's check, and what draws the preset without the artifact and with its strength at 0."""
        name = table["of"]
        if name not in [*preset.insert, *preset.bake, *preset.sidecars]:
            guess = nearest(name, [*preset.insert, *preset.bake, *preset.sidecars])
            hint = f"did you mean `{guess}`?" if guess else "what shows must be in `bake`, `insert` or `sidecars`"
            self.wrong("unknown-name", f"[preset] does not take `{name}`", *path, "of", hint=hint, value=True)
            return
        self._draw(preset.model_copy(update=_left_out(preset, name)), f"{target}.without")
        drawn = {"without": f"{target}.without.pictures"}
        if name in preset.bake:
            self._draw(preset.model_copy(update={"bake": preset.bake | {name: 0.0}}), f"{target}.zero")
            drawn["at_zero"] = f"{target}.zero.pictures"
        self._target(target, "effect", table | drawn, path)

    def _draw(self, preset: Any, stem: str) -> None:
        """Add the targets that draw another preset with the same prompts and seeds."""
        checkpoint, steps = self._chain(preset, stem)
        steps.append((f"{stem}.pictures", "previews", {"checkpoint": checkpoint, **_drawing(preset)}))
        for name, method_name, raw in steps:
            self._target(name, method_name, raw, ("preset",))

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

    def _refuse_twice(self, preset: Any) -> None:
        for i, name in enumerate(preset.sidecars):
            place, hint = ("preset", "sidecars", i), "it would act twice"
            if name in preset.bake:
                self.wrong("setting", f"`{name}` is baked and a sidecar", *place, hint=hint, value=True)
            elif name in preset.sidecars[:i]:
                self.wrong("setting", f"`{name}` is a sidecar twice", *place, hint=hint, value=True)

    def _behind(self, preset: Any) -> tuple[dict[str, list[str]], list[str]]:
        """What lies behind the preset in this recipe: export's roles → what targets made, and bases."""
        kinds = {role.kind for role in method("bake").signature.roles.values()} - {"checkpoint"}
        baked, embeddings, bases = list(preset.bake), list(preset.insert), []
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
                    baked.append(use.reference)
                elif kind == "embedding" and not (use.use or {}).get("over"):
                    embeddings.append(use.reference)
        made = [name for name in dict.fromkeys(baked) if name in self.targets or ":" in name]
        routed = {"embeddings": list(dict.fromkeys(embeddings))} | self._routed("export", made, "loras")
        return routed, bases[:4]


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


def explain(
    error: ValidationError, model: type[BaseModel], document: Document, path: tuple[str, ...]
) -> Iterator[Problem]:
    """Yield a problem for each complaint of pydantic, in the words of recipes."""
    for fault in error.errors(include_url=False):
        kind = fault["type"]
        if kind == "none_required":  # the other half of an optional setting's complaint
            continue
        place = _walked(fault["loc"], document, path)
        where = (*path, *place)
        name = _spelled(place) or path[-1]
        what = ".".join(path) or document.file
        if kind == "extra_forbidden":
            known = _known(model, place[:-1])
            guess = nearest(str(place[-1]), known)
            hint = f"did you mean `{guess}`?" if guess else f"it has {', '.join(sorted(known)) or 'none'}"
            yield Problem("unknown-setting", f"`{name}` is no setting of {what}", document.place(*where), hint)
        elif kind == "missing":
            table = ".".join(map(str, where[:-1])) or document.file
            yield Problem("missing", f"{table} needs `{place[-1]}`", document.place(*where[:-1]), "")
        else:
            guess = nearest(str(fault["input"]), _choices(fault)) if kind == "literal_error" else ""
            hint = f"did you mean {guess!r}?" if guess else ""
            yield Problem("setting", f"`{name}` {_sentence(fault)}", document.place(*where, value=True), hint)


def _walked(location: tuple[int | str, ...], document: Document, path: tuple[str, ...]) -> tuple[int | str, ...]:
    """Return pydantic's location without what stands in no document: names of unions' members and `[key]`."""
    value: Any = document.values
    for table in path:
        value = value.get(table, {}) if isinstance(value, dict) else {}
    kept: list[int | str] = []
    for i, part in enumerate(location):
        inside = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if inside:
            kept.append(part)
            value = value[part]
        elif i == len(location) - 1 and isinstance(value, dict) and part != "[key]":
            kept.append(part)  # what is missing
    return tuple(kept)


def _spelled(place: tuple[int | str, ...]) -> str:
    """Return a location as a person writes it: `blocks.unet.mid`, `weights[2]` (counted from 1)."""
    text = ""
    for part in place:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _known(model: Any, place: tuple[int | str, ...]) -> list[str]:
    """Return the settings of the (sub-)table in which an unknown one stands."""
    from typing import get_args

    for part in place:
        if isinstance(part, str) and hasattr(model, "model_fields") and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            inner = [a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields")]
            model = inner[0] if inner else model
    return [field.alias or name for name, field in getattr(model, "model_fields", {}).items()]


MOST_CHOICES = 12  # that a sentence lists


def _choices(fault: Any) -> list[str]:
    """Return the words that a setting may have, without the empty one."""
    return [word.strip("'") for word in fault["ctx"]["expected"].replace(" or ", ", ").split(", ") if word != "''"]


def _sentence(fault: Any) -> str:
    kind, context, given = fault["type"], fault.get("ctx", {}), fault.get("input")
    shown = json.dumps(given, default=str, ensure_ascii=False)
    shown = shown if len(shown) <= 60 else shown[:57] + "…"
    if kind in ("int_type", "int_from_float"):
        return f"is a whole number, not {shown}"
    if kind in ("float_type", "finite_number"):
        return f"is a number, not {shown}"
    if kind == "bool_type":
        return f"is true or false, not {shown}"
    if kind == "string_type":
        return f"is text, not {shown}"
    if kind in ("list_type", "dict_type", "model_type"):
        return f"is a {'list' if kind == 'list_type' else 'table'}, not {shown}"
    if kind == "literal_error":
        known = _choices(fault)
        listed = ", ".join(map(repr, known[:MOST_CHOICES])) + (" …" if len(known) > MOST_CHOICES else "")
        return f"is one of {listed}, not {shown}"
    if kind == "string_pattern_mismatch":
        return f"is no name: {shown}" if context["pattern"] == REFERENCE else f"cannot be {shown}"
    bounds = {
        "greater_than_equal": ("ge", "at least"),
        "greater_than": ("gt", "more than"),
        "less_than_equal": ("le", "at most"),
        "less_than": ("lt", "less than"),
        "multiple_of": ("multiple_of", "a multiple of"),
    }
    if kind in bounds:
        key, words = bounds[kind]
        return f"is {words} {context[key]:g}, not {shown}"
    if kind in ("too_short", "string_too_short"):
        return f"holds at least {context['min_length']}, not {len(given)}" if given else "is empty"
    if kind in ("too_long", "string_too_long"):
        return f"holds at most {context['max_length']}, not {len(given)}"
    return f"does not fit: {fault['msg'].lower()}"


def check_name(name: str) -> None:
    """Refuse a recipe's file name that no command line could name. Raises UsageError."""
    if not is_name(name):
        raise UsageError(f"{name!r} is no name for a recipe", hint="small letters, digits, - and _, at most 64")
