"""Recipes and project, linked: which target takes what from where, in an order in which they can be made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sdforge.errors import Place, Problem, RecipeError, UsageError, nearest
from sdforge.method import Role
from sdforge.places import FILE
from sdforge.project import Project, read_small
from sdforge.recipe import FaultyRecipe, Recipe, place_in
from sdforge.syntax import read_toml
from sdforge.target import Target, Use


class Taken(NamedTuple):
    """A source or data set as some recipe sees it. id: how lock and reports call it; table: what is stated of it."""

    id: str
    kind: str  # source | dataset
    table: dict[str, Any]


class Link(NamedTuple):
    """An input of a node: how it is used, and the id of the node or source that it names."""

    use: Use
    id: str


@dataclass(slots=True)
class Node:
    """A target in its place. checks: ids of the checks that have to pass before its files are written."""

    id: str  # RECIPE:NAME
    recipe: Recipe
    target: Target
    links: tuple[Link, ...] = ()
    checks: tuple[str, ...] = ()


@dataclass
class Graph:
    """Nodes in an order in which inputs come first, and the sources they take."""

    nodes: dict[str, Node] = field(default_factory=dict)
    sources: dict[str, Taken] = field(default_factory=dict)
    users: dict[str, list[str]] = field(default_factory=dict)

    def behind(self, wanted: list[str]) -> list[Node]:
        """Return the wanted nodes and all they need, inputs first."""
        keep, stack = set(), list(wanted)
        while stack:
            identifier = stack.pop()
            if identifier in self.nodes and identifier not in keep:
                keep.add(identifier)
                stack += [link.id for link in self.nodes[identifier].links]
                stack += self.nodes[identifier].checks
        return [node for identifier, node in self.nodes.items() if identifier in keep]


def link_recipes(project: Project, names: list[str]) -> Graph:
    """Link recipes, and those that they name. Raises RecipeError with every name that means nothing, or a cycle."""
    linking = _Linking(project)
    for name in names:
        linking.add(name)
    linking.check_shadows()
    if linking.problems:
        raise RecipeError(linking.problems)
    return linking.sorted()


class _Linking:
    def __init__(self, project: Project) -> None:
        self.project = project
        self.problems: list[Problem] = []
        self.nodes: dict[str, Node] = {}
        self.sources: dict[str, Taken] = {}
        self.added: dict[str, Recipe] = {}
        self.queue: list[str] = []  # recipes that are still to be added

    def add(self, name: str) -> None:
        """Add a recipe, and all that it names."""
        self.queue.append(name)
        while self.queue:
            name = self.queue.pop()
            if name in self.added:
                continue
            try:
                recipe = self.project.recipe(name)
            except RecipeError as error:
                self.problems += [problem for problem in error.problems if problem not in self.problems]
                nothing = Recipe(name, "", "", "", {}, {}, {})
                recipe = error.rest if isinstance(error, FaultyRecipe) else nothing
            self.added[name] = recipe
            self.queue += dict.fromkeys(recipe.shared.values())
            checks = tuple(f"{recipe.name}:{t.name}" for t in recipe.targets.values() if t.signature.group == "checks")
            for target in recipe.targets.values():
                if target.name in recipe.shared:
                    continue
                links = []
                for use in target.uses:
                    found = self._find(recipe, target, use)
                    if found:
                        links.append(Link(use, found))
                        if found not in self.sources:
                            self._check_kind(recipe, target, use, found)
                        other = found.partition(":")[0]
                        if found not in self.sources and other not in self.added:
                            self.queue.append(other)
                identifier = f"{recipe.name}:{target.name}"
                gates = checks if target.placed else ()
                self.nodes[identifier] = Node(identifier, recipe, target, tuple(links), gates)

    def _find(self, recipe: Recipe, target: Target, use: Use) -> str:
        """Return the id of what a name means: a target of this recipe, of another one, or a source; or a problem."""
        name = use.reference
        other, colon, rest = name.partition(":")
        if colon:
            return self._elsewhere(recipe, target, use, other, rest)
        if name in recipe.targets:
            return recipe.id(name)
        wants = target.signature.roles[use.role].kind
        for kind, own, shared in (
            ("source", recipe.sources, self.project.sources),
            ("dataset", recipe.datasets, self.project.datasets),
        ):
            if name in own or name in shared:
                identifier = f"{recipe.home}/{name}" if name in own else name
                self.sources.setdefault(identifier, Taken(identifier, kind, own[name] if name in own else shared[name]))
                return identifier
        known = [*recipe.targets, *recipe.sources, *recipe.datasets, *self.project.sources, *self.project.datasets]
        guess = nearest(name, known)
        hint = (
            f"did you mean `{guess}`?"
            if guess
            else f"declare it: [{'dataset' if wants == 'dataset' else 'source'}.{name}]"
        )
        if not target.implicit or _in_preset(name, recipe.preset or {}):  # else it is said where it is written
            self._problem(recipe, target, use, "unknown-name", f"`{name}` is neither a target nor a source", hint)
        return ""

    def _elsewhere(self, recipe: Recipe, target: Target, use: Use, other: str, rest: str) -> str:
        try:
            found = self.project.recipe(other)
        except RecipeError:
            self.queue.append(other)  # its own problems say what is wrong
            return ""
        except UsageError as error:
            self._problem(recipe, target, use, "unknown-name", f"`{use.reference}`: {error.message}", error.hint)
            return ""
        if rest not in found.targets:
            guess = nearest(rest, list(found.targets))
            hint = f"did you mean `{other}:{guess}`?" if guess else f"it has {', '.join(found.targets)}"
            self._problem(recipe, target, use, "unknown-name", f"recipe `{other}` has no target `{rest}`", hint)
            return ""
        return found.id(rest)

    def _check_kind(self, recipe: Recipe, target: Target, use: Use, found: str) -> None:
        """Refuse a target that makes another kind of thing than belongs here; sources are looked at later."""
        name, _, rest = found.partition(":")
        makes = self.project.recipe(name).targets[rest].signature.makes if name != recipe.name else ""
        makes = makes or recipe.targets[rest].signature.makes
        role = target.signature.roles[use.role]
        if makes not in role.kinds:
            hint = way_in(use.reference, makes) if target.implicit else ""
            self._problem(recipe, target, use, "kind", wrong_kind(use.reference, makes, role), hint)

    def _problem(self, recipe: Recipe, target: Target, use: Use, code: str, message: str, hint: str = "") -> None:
        found = problem_at(self.project, recipe, target, use, code, message, hint)
        if found not in self.problems:  # a preset's targets share what they take
            self.problems.append(found)

    def check_shadows(self) -> None:
        """A recipe may not give a name of `forge.toml` another meaning."""
        shared = {**dict.fromkeys(self.project.sources, "source"), **dict.fromkeys(self.project.datasets, "dataset")}
        for recipe in self.added.values():
            if recipe.name != recipe.home:
                continue  # its names are the plain one's
            own = {t.name: t.path for t in recipe.targets.values() if not t.implicit}
            own |= {name: ("source", name) for name in recipe.sources}
            own |= {name: ("dataset", name) for name in recipe.datasets}
            for name in sorted(own.keys() & shared.keys()):
                place = recipe_place(self.project, recipe, *own[name])
                message = f"`{name}` is the name of a {shared[name]} in {FILE}"
                self.problems.append(Problem("name", message, place, "give it another name"))

    def sorted(self) -> Graph:
        """Order the nodes, inputs first (Kahn), without recursion; whatever is left over goes round in circles."""
        waiting = {i: {link.id for link in n.links if link.id in self.nodes} for i, n in self.nodes.items()}
        users: dict[str, list[str]] = {}
        for identifier, inputs in waiting.items():
            for each in inputs:
                users.setdefault(each, []).append(identifier)
        ready = [identifier for identifier, inputs in waiting.items() if not inputs]
        graph = Graph(sources=self.sources, users=users)
        for identifier in ready:  # grows while it is walked
            graph.nodes[identifier] = self.nodes[identifier]
            for user in users.get(identifier, ()):
                waiting[user].discard(identifier)
                if not waiting[user]:
                    ready.append(user)
        if len(graph.nodes) < len(self.nodes):
            raise RecipeError(list(self._cycles({i: w for i, w in waiting.items() if w})))
        return graph

    def _cycles(self, waiting: dict[str, set[str]]) -> Iterator[Problem]:
        """Yield circles that share no target, until none is left."""
        while waiting:
            problem, circle = self._cycle(waiting)
            yield problem
            gone = set(circle)
            while gone:  # what only waited for them goes with them
                waiting = {i: w - gone for i, w in waiting.items() if i not in gone}
                gone = {i for i, w in waiting.items() if not w & waiting.keys()}

    def _cycle(self, waiting: dict[str, set[str]]) -> tuple[Problem, list[str]]:
        path = [min(waiting)]
        while True:
            following = min(waiting[path[-1]] & waiting.keys(), default="") or min(waiting[path[-1]])
            if following in path:
                circle = [*path[path.index(following) :], following]
                node = self.nodes[circle[0]]
                used = next(link.use for link in node.links if link.id == circle[1])
                one = len({identifier.partition(":")[0] for identifier in circle}) == 1
                names = " → ".join(identifier.partition(":")[2] if one else identifier for identifier in circle)
                message = f"targets that need each other can never be made: {names}"
                return problem_at(self.project, node.recipe, node.target, used, "cycle", message), circle
            path.append(following)


def problem_at(
    project: Project,
    recipe: Recipe,
    target: Target,
    use: Use | None,
    code: str,
    message: str,
    hint: str = "",
    *,
    key: str = "",
    warning: bool = False,
) -> Problem:
    """Return a problem at the place where a target's table stands, a name in it, or a key of it."""
    if key or use is None:
        place = recipe_place(project, recipe, *target.path, *_path_to(key, target.raw))
    else:
        place = use_place(project, recipe, target, use)
    return Problem(code, message, place, hint, warning)


def use_place(project: Project, recipe: Recipe, target: Target, use: Use) -> Place:
    """Return where a target's table, or `[preset]` for it, names an artifact."""
    path: tuple[str | int, ...] = (*target.path, use.role)
    value = True
    if target.implicit:
        path, value = _preset_path(use, recipe.preset or {})
    elif target.signature.roles[use.role].many == "table":
        path, value = (*target.path, use.role, use.reference), False
    elif target.signature.roles[use.role].many == "list":
        position = [u.reference for u in target.uses if u.role == use.role].index(use.reference)
        path = (*target.path, use.role, position)
    return recipe_place(project, recipe, *path, value=value)


def recipe_place(project: Project, recipe: Recipe, *path: str | int, value: bool = False) -> Place:
    """Return where something stands in a recipe's file; what a variant sets stands in the variant."""
    return place_in(project.recipe_text(recipe.name), recipe.name, recipe.file, *path, value=value)


def _in_preset(name: str, preset: dict[str, Any]) -> bool:
    """Say whether `[preset]` itself names an artifact; its targets also take what lies behind those."""
    named = [preset.get("checkpoint"), *preset.get("insert", ()), *preset.get("bake", ()), *preset.get("sidecars", ())]
    return name in named


def source_place(project: Project, identifier: str) -> Place:
    """Return where a source or data set says where it lies."""
    recipe, slash, name = identifier.rpartition("/")
    own = project.recipe(recipe).datasets if slash else project.datasets
    path = ("dataset", name, "path") if name in own else ("source", name, "from")
    if slash:
        return recipe_place(project, project.recipe(recipe), *path, value=True)
    return read_toml(read_small(project.root / FILE, ""), FILE).place(*path, value=True)


def wrong_kind(name: str, makes: str, role: Role) -> str:
    """Return the sentence for an artifact of another kind than belongs there."""
    a, *wanted = (f"{'an' if k[0] in 'aeiou' else 'a'} {k.replace('_', ' ')}" for k in (makes, *role.kinds))
    b = " or ".join(filter(None, [", ".join(wanted[:-1]), wanted[-1]]))
    return f"`{name}` is {a}, and {b} belongs here"


PRESET = {  # kind → how [preset] takes it
    "checkpoint": 'checkpoint = "NAME"',
    "embedding": 'insert = ["NAME"]',
    "lora": "bake = { NAME = 1.0 }",
    "custom": "bake = { NAME = 1.0 }",
    "hypernetwork": 'bake = { NAME = 1.0 }, or sidecars = ["NAME"] where it is not linear',
    "aesthetic": 'bake = { NAME = 1.0 }, or sidecars = ["NAME"]',
    "image_embedding": 'bake = { NAME = 1.0 }, or sidecars = ["NAME"]',
    "null_text": 'sidecars = ["NAME"]',
}


def way_in(name: str, makes: str) -> str:
    """Return how a preset takes an artifact of a kind, or nothing."""
    return f"[preset] {PRESET[makes].replace('NAME', name)}" if makes in PRESET else ""


def _path_to(key: str, table: dict[str, Any]) -> tuple[str, ...]:
    """Return the path to a key within a table, or nothing."""
    if not key or key in table:
        return (key,) if key else ()
    for name, value in table.items():
        if isinstance(value, dict) and (rest := _path_to(key, value)):
            return (name, *rest)
    return ()


def _preset_path(use: Use, preset: dict[str, Any]) -> tuple[tuple[str | int, ...], bool]:
    for key in ("insert", "sidecars"):
        if use.reference in preset.get(key, []):
            return ("preset", key, preset[key].index(use.reference)), True
    if use.role == "loras" or use.reference in preset.get("bake", {}):
        return ("preset", "bake", use.reference), False
    return ("preset", "checkpoint"), True
