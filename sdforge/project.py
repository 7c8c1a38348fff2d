"""`forge.toml` (and `forge.local.toml`, which is not in git) → `Project`: where things are and how to run here."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdforge.complaints import explain, secrets_in
from sdforge.errors import Place, Problem, RecipeError, UsageError, nearest
from sdforge.method import method_groups
from sdforge.names import REFERENCE, hint_at_name, is_name
from sdforge.places import FILE, LOCAL, LOCK, OUT, RECIPES, amount, code_fingerprint
from sdforge.recipe import Recipe, check_name, read_recipe
from sdforge.store.files import open_regular, within
from sdforge.syntax import MOST_BYTES, Document, read_toml
from sdforge.variants import MARK, cells, split

if TYPE_CHECKING:
    from sdforge.index import Index
    from sdforge.settings import Table


LAYERED = ("run", "remote", "cluster")  # tables of forge.toml that forge.local.toml may state otherwise


@dataclass
class Project:
    """A folder with a `forge.toml`.

    sources, datasets: name → table, as recipes may use them. run, remote, cluster: how to run here and elsewhere, with
    what shared cache; `forge.local.toml` before `forge.toml`. trusted: public keys, of both. folders: where sources lie
    that are not in the project. made: the folder that `forge.lock` and `out/` lie in, the root unless both must be left
    alone. max_cache: bytes that the cache may hold; 0: no bound. commands: of checks, those that may run here. trials:
    recipe → text that is read as if it stood at its end.
    """

    root: Path
    index: Index
    default: list[str] = field(default_factory=list)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    remote: dict[str, Any] = field(default_factory=dict)
    cluster: dict[str, Any] = field(default_factory=dict)
    trusted: list[str] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    made: Path | None = None
    max_cache: int = 0
    commands: list[list[str]] = field(default_factory=list)
    trials: dict[str, bytes] = field(default_factory=dict)
    _recipes: dict[str, Recipe] = field(default_factory=dict)
    _parsed: dict[str, str] = field(default_factory=dict)  # what the index does not have yet

    @property
    def out(self) -> Path:
        return (self.made or self.root) / OUT

    @property
    def lock(self) -> Path:
        return (self.made or self.root) / LOCK

    def recipe_names(self) -> list[str]:
        """Return the names of all recipes; files that no command line could name are in `misnamed`."""
        return [name for name in self._stems() if is_name(name)]

    def misnamed(self) -> list[Problem]:
        """Return a problem for each file in `recipes/` that is no recipe since its name is none."""
        return [
            Problem("name", f"{name!r} is no name for a recipe", Place(f"{RECIPES}/{name}.toml"), hint_at_name(name))
            for name in self._stems()
            if not is_name(name)
        ]

    def _stems(self) -> list[str]:
        folder = self.root / RECIPES
        return sorted(p.stem for p in folder.glob("*.toml")) if folder.is_dir() else []

    def preset_names(self) -> list[str]:
        """Return the names of all recipes, each with its variants behind it."""
        return [preset for name in self.recipe_names() for preset in self.with_variants(name)]

    def with_variants(self, name: str) -> list[str]:
        """Return a recipe's name and those of its variants; of one with mistakes its own alone."""
        try:
            return [name, *(f"{name}{MARK}{variant}" for variant in self.recipe(name).variants)]
        except (RecipeError, UsageError):
            return [name]

    def variants(self, name: str) -> list[str]:
        """Return the variants that `RECIPE@NAME` means: one, or all of a sweep. Raises UsageError, RecipeError."""
        home, variant = split(name)
        recipe = self.recipe(home)
        if variant in recipe.variants:
            return [name]
        if variant in recipe.sweeps:
            return [f"{home}{MARK}{cell}" for cell in cells(variant, recipe.sweeps[variant])]
        known = [*recipe.variants, *recipe.sweeps]
        guess = nearest(variant, known)
        raise UsageError(
            f"recipe {home!r} has no variant {variant!r}",
            hint=f"did you mean '{home}{MARK}{guess}'?" if guess else f"it has {', '.join(known) or 'none'}",
        )

    def try_out(self, name: str, text: str) -> None:
        """Read a recipe from now on as if this text stood at its end."""
        self.trials[name] = text.encode()
        self._recipes.pop(name, None)

    def recipe_path(self, name: str) -> Path:
        """Return the file of a recipe, or of the one that a variant is of. Raises UsageError for what is no name."""
        home = split(name)[0]
        check_name(home)
        return within(self.root, f"{RECIPES}/{home}.toml")

    def recipe_text(self, name: str) -> bytes:
        """Return the text in which a recipe (or the one that a variant is of) stands. Raises UsageError."""
        home = split(name)[0]
        path = self.recipe_path(name)
        return read_small(path, f"there is no recipe {home!r}", hint=self._guess(home)) + self.trials.get(home, b"")

    def recipe(self, name: str) -> Recipe:
        """Return a recipe or a variant. Raises UsageError if there is none, RecipeError if it has mistakes."""
        if name not in self._recipes:
            source, home = self.recipe_text(name), split(name)[0]
            if name != home and name not in self.variants(name):
                raise UsageError(f"{name!r} is a sweep", hint=f"one of it is '{name}-1'")
            file = f"{RECIPES}/{home}.toml"
            self._recipes[name] = self.parsed(
                "recipe", name, source, lambda: read_recipe(source, name, file), Recipe.dump, Recipe.load
            )
        return self._recipes[name]

    def _guess(self, name: str) -> str:
        guess = nearest(name, self.recipe_names())
        return f"did you mean {guess!r}?" if guess else f"there are: {', '.join(self.recipe_names()) or 'none'}"

    def expect(self, names: list[str]) -> None:
        """Look several recipes up in the cache of what was read, in one go."""
        ids = []
        for name in names:
            if name not in self._recipes:
                with suppress(UsageError):  # it is said where the recipe is asked for
                    ids += [_parsed_id("recipe", each, self.recipe_text(each)) for each in (split(name)[0], name)]
        self._parsed |= self.index.read_keyed("parsed", ids)

    def parsed(
        self,
        kind: str,
        name: str,
        source: bytes,
        read: Callable[[], Any],
        dump: Callable[[Any], str],
        load: Callable[[str], Any],
    ) -> Any:
        """Read a text, or take what was read from the same text with the same code before."""
        identifier = _parsed_id(kind, name, source)
        text = self._parsed.get(identifier) or self.index.read_keyed("parsed", [identifier]).get(identifier)
        if text is not None:
            return load(text)
        value = read()
        self._parsed[identifier] = dump(value)
        self.index.put("parsed", {identifier: self._parsed[identifier]})
        return value


def _parsed_id(kind: str, name: str, source: bytes) -> str:
    return hashlib.sha256(f"{kind}\0{name}\0{code_fingerprint()}\0".encode() + source).hexdigest()


def read_small(path: Path, missing: str, hint: str = "") -> bytes:
    """Read a small text of the project. Raises UsageError if it is not there, or is no regular file."""
    if missing and not os.path.lexists(path):
        raise UsageError(missing, hint)
    fd = open_regular(path)
    with os.fdopen(fd, "rb") as file:
        return file.read(MOST_BYTES + 1)


def open_project(root: Path, index: Index) -> Project:
    """Read `forge.toml` and `forge.local.toml`. Raises RecipeError with all that is wrong in them."""
    project = Project(root, index)
    values = _read(project, FILE, "ForgeToml")
    local = _read(project, LOCAL, "ForgeLocalToml") if (root / LOCAL).exists() else {}
    project.default = values.get("default", [])
    project.sources = values.get("source", {})
    project.datasets = values.get("dataset", {})
    stated = local.get("stated", {})
    for key in LAYERED:
        setattr(project, key, _over(values.get(key, {}), stated.get(key, {})))
    project.trusted = [key for each in (values, local) for key in each.get("trust", {}).get("keys", [])]
    bounds = [given.get("cache", {}).get("max_size", "") for given in (local, values)]
    project.max_cache = amount(next(filter(None, bounds), ""))
    project.commands = local.get("checks", {}).get("commands", [])
    project.folders = [root / os.path.expanduser(p) for p in local.get("folders", [])]  # noqa: PTH111
    return project


def _read(project: Project, name: str, model: str) -> dict[str, Any]:
    source = read_small(project.root / name, f"there is no {name}")

    def read() -> dict[str, Any]:
        import sdforge.tables as tables

        return _checked(source, name, getattr(tables, model))

    found: dict[str, Any] = project.parsed("project", name, source, read, json.dumps, json.loads)
    return found


def _checked(source: bytes, name: str, model: type[Table]) -> dict[str, Any]:
    from pydantic import ValidationError

    document = read_toml(source, name)
    try:
        table = model.model_validate(document.values)
    except ValidationError as error:
        raise RecipeError(list(explain(error, model, document, ()))) from None
    found = table.model_dump(by_alias=True)
    seen: dict[str, str] = {}
    problems = []
    for key in ("source", "dataset"):
        for each in found.get(key, {}):
            if not is_name(each) or each in seen:
                reason = f"`{each}` is already a {seen[each]}" if each in seen else f"`{each}` is no name"
                hint = "sources and data sets have different names" if each in seen else hint_at_name(each)
                problems.append(Problem("name", reason, document.place(key, each), hint))
            seen[each] = key
    problems += _strange_jobs(found["cluster"], document)
    stated = [(("source", name, "from"), table["from"]) for name, table in found.get("source", {}).items()]
    problems += secrets_in([*stated, (("remote", "address"), found["remote"]["address"])], document)
    if problems:
        raise RecipeError(problems)
    found["stated"] = {  # what forge.local.toml itself says
        table: {key: found[table][key] for key in document.values.get(table, {})} for table in LAYERED
    }
    return found


def _strange_jobs(cluster: dict[str, Any], document: Document) -> Iterator[Problem]:
    """Yield a problem for each name in `[cluster]` that no method or target can have."""
    for name in cluster["methods"]:
        if name not in method_groups():
            guess = nearest(name, list(method_groups()))
            hint = f"did you mean `{guess}`?" if guess else "a recipe's tables are called [METHOD.NAME]"
            yield Problem("name", f"there is no method `{name}`", document.place("cluster", "methods", name), hint)
    for name in cluster["targets"]:
        if ":" not in name or not re.fullmatch(REFERENCE, name):
            place = document.place("cluster", "targets", name)
            yield Problem("name", f"`{name}` names no target", place, 'as in [cluster.targets."RECIPE:TARGET"]')


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return a table with what another one states before it; None states nothing."""
    stated = {name: value for name, value in above.items() if value is not None}
    inner = {name: _over(below[name], value) for name, value in stated.items() if _both_tables(below.get(name), value)}
    return below | stated | inner


def _both_tables(*values: object) -> bool:
    return all(isinstance(value, dict) for value in values)
