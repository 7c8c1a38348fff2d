"""One command's view of a project: its graph, sources, store, lock and outputs, and the plan they give."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdforge.artifact import Component, Tensor
from sdforge.chronicle import Chronicle
from sdforge.errors import (
    BrokenPromise,
    ForgeError,
    LostObject,
    Problem,
    RecipeError,
    ResourceError,
    UsageError,
    nearest,
)
from sdforge.fitting import Misfit, Misfits
from sdforge.graph import Graph, link_recipes, problem_at, source_place
from sdforge.lock import Lock, Pin, read_lock
from sdforge.looks import Looks
from sdforge.one_pass import Pass, one_pass
from sdforge.outputs import Outputs
from sdforge.places import LOCK, cache_folder, find_root
from sdforge.plan import Plan, Step, Wishes
from sdforge.planner import Planner
from sdforge.project import Project, open_project
from sdforge.sources import Progress, Sources, silent
from sdforge.store import Store
from sdforge.store.entries import Known, Result
from sdforge.store.files import damaged
from sdforge.target import EXPORT, PREVIEWS
from sdforge.variants import MARK

if TYPE_CHECKING:
    from sdforge.sharing import Sharing


@dataclass
class Session:
    """A project that is open.

    retrain: ids whose results are to be made again; locked: nothing may differ; checked: checks decide what is written;
    trusting: commands of checks may run.
    """

    project: Project
    store: Store
    sources: Sources
    outputs: Outputs
    lock: Lock = field(default_factory=Lock)
    graph: Graph = field(default_factory=Graph)
    retrain: set[str] = field(default_factory=set)
    locked: bool = False
    checked: bool = True
    trusting: bool = False
    sharing: Sharing | None = None
    unreachable: ForgeError | None = None  # why there is no remote cache any more
    chronicle: Chronicle = field(init=False)
    _planner: Planner | None = None
    _relied: set[Path] = field(default_factory=set)  # packs that were asked for, and files that checks name
    _found: dict[str, Path] = field(default_factory=dict)  # sha256 → file, since the last plan was begun

    def __post_init__(self) -> None:
        self.chronicle = Chronicle(self.store.index, self.project.root, self.project.out)

    def share(self, mode: str = "") -> None:
        """Have the remote cache at hand that `[remote]` names; mode: `read`, `write` or `off`, before what it says."""
        remote = self.project.remote
        mode = mode or remote.get("mode", "read")
        if remote.get("address") and mode != "off":
            from sdforge.remotes import open_remote
            from sdforge.sharing import Sharing

            try:
                place = open_remote(remote["address"], self.project.root)
            except ResourceError as error:
                self.leave_remote(error)
                return
            self.sharing = Sharing(self.store, place, mode == "write", tuple(self.project.trusted))

    def read_lock(self) -> None:
        """Read `forge.lock` as it is now."""
        path = self.project.lock
        if not path.is_file():
            self.lock = Lock()
            return
        source = path.read_bytes()
        self.lock = self.project.parsed(
            "lock", LOCK, source, lambda: read_lock(source, LOCK), Lock.to_json, Lock.from_json
        )

    # -- names -----------------------------------------------------------------------------------------------------

    def open_recipes(self, names: list[str]) -> None:
        """Link recipes, and look up in one go what is known of them."""
        self.project.expect(names)
        self.graph = link_recipes(self.project, names)
        recipes = list(dict.fromkeys(node.recipe.name for node in self.graph.nodes.values()))
        self.store.expect([f"{self.project.root}:{name}" for name in recipes])
        self.sources.expect(list(self.graph.sources.values()))
        self.outputs.expect(recipes)

    def resolve(self, names: list[str]) -> list[str]:
        """Turn names of the command line into ids of targets, with their recipes linked.

        NAME is a recipe, RECIPE:NAME a target, and a bare target name serves where it is the only one of it. Behind a
        recipe's name may stand @NAME, a variant of it, or all variants of a sweep.
        Raises UsageError with a guess at what was meant.
        """
        names = names or self.project.default
        if not names:
            listed = ", ".join(self.project.recipe_names())
            raise UsageError(
                "nothing to build: no recipe was named, and forge.toml has no `default`",
                hint=f"there are: {listed}" if listed else "there is none yet: write recipes/NAME.toml",
            )
        recipes = self.project.recipe_names()
        asked: list[tuple[str, str]] = []
        for name in names:
            recipe, _, target = name.partition(":")
            if MARK in recipe:
                asked += [(each, target) for each in self.project.variants(recipe)]
                continue
            if recipe not in recipes and not target:
                recipe, target = self._owner(name, recipes)
            asked.append((recipe, target))
        self.open_recipes(list(dict.fromkeys(recipe for recipe, _ in asked)))
        wanted: list[str] = []
        for recipe, target in asked:
            wanted += [self.project.recipe(recipe).id(target)] if target else self.ends_of(recipe)
        if not wanted:
            empty = ", ".join(dict.fromkeys(recipe for recipe, _ in asked))
            raise UsageError(f"{empty} makes nothing", hint="a target, [METHOD.NAME], or a [preset] says what is made")
        for identifier in wanted:
            if identifier not in self.graph.nodes:
                recipe, _, target = identifier.partition(":")
                known = list(self.project.recipe(recipe).targets)
                guess = nearest(target, known)
                raise UsageError(
                    f"recipe {recipe!r} has no target {target!r}",
                    hint=f"did you mean {guess!r}?" if guess else f"it has {', '.join(known)}",
                )
        return list(dict.fromkeys(wanted))

    def resolve_targets(self, names: list[str]) -> list[str]:
        """Turn names into ids of targets of the recipes that are open. Raises UsageError."""
        found = []
        for each in names:
            name = self._shared(each)
            matches = [i for i in self.graph.nodes if i == name or i.partition(":")[2] == name]
            if len(matches) != 1:
                known = [i.partition(":")[2] for i in self.graph.nodes if not i.partition(":")[2].startswith("preset.")]
                guess = nearest(name, known)
                there = f"did you mean {guess!r}?" if guess else f"there are: {', '.join(known) or 'none'}"
                raise UsageError(
                    f"{name!r} is {'no' if not matches else 'more than one'} target of what is built",
                    hint=" or ".join(matches) or there,
                )
            found += matches
        return found

    def _shared(self, name: str) -> str:
        """Return the id of the plain recipe's target that a variant's is, where it is that one."""
        recipe, _, target = name.partition(":")
        return self.project.recipe(recipe).id(target) if MARK in recipe else name

    def want_again(self, names: list[str]) -> None:
        """Note whose results are to be made again. Raises UsageError for what comes out the same every time."""
        for identifier in self.resolve_targets(names):
            signature = self.graph.nodes[identifier].target.signature
            if signature.kind != "content" or not signature.pinned:
                raise UsageError(
                    f"{identifier} is no training: made again it is the same, byte for byte",
                    hint="--retrain takes targets whose results the lock pins",
                )
            self.retrain.add(identifier)

    def _owner(self, name: str, recipes: list[str]) -> tuple[str, str]:
        """Find the one recipe that has a target of this name."""
        owners, known = [], list(recipes)
        for recipe in recipes:
            try:
                known += self.project.recipe(recipe).targets
            except RecipeError:
                continue
            if name in self.project.recipe(recipe).targets:
                owners.append(recipe)
        if len(owners) == 1:
            return owners[0], name
        if owners:
            raise UsageError(
                f"{name!r} is a target of several recipes", hint=" or ".join(f"{r}:{name}" for r in owners)
            )
        guess = nearest(name, known)
        raise UsageError(
            f"there is no recipe and no target {name!r}",
            hint=f"did you mean {guess!r}?" if guess else f"there are: {', '.join(recipes) or 'none'}",
        )

    def ends(self, wanted: list[str]) -> list[str]:
        """Return what a build of the recipes of these targets would want, and the targets themselves."""
        recipes = dict.fromkeys(identifier.partition(":")[0] for identifier in wanted)
        found = [end for recipe in recipes for end in self.ends_of(recipe)]
        behind = {node.id for node in self.graph.behind(found)}
        return found + [identifier for identifier in wanted if identifier not in behind]

    def ends_of(self, recipe: str) -> list[str]:
        """What is wanted of a whole recipe: the preset's files, or all targets that no other one of it takes."""
        found = self.project.recipe(recipe)
        files = [name for name in (EXPORT, PREVIEWS) if name in found.targets]
        taken = {u.reference.removeprefix(f"{found.home}:") for each in found.targets.values() for u in each.uses}
        return [found.id(name) for name in files or [name for name in found.targets if name not in taken]]

    # -- planning --------------------------------------------------------------------------------------------------

    def planner(self) -> Planner:
        """Return the planner of the last plan."""
        assert self._planner is not None
        return self._planner

    def plan(self, wanted: list[str]) -> Plan:
        """Plan. Raises RecipeError for inputs that do not fit, each at its place."""
        self._found = {}
        wishes = Wishes(frozenset(self.retrain), self.locked, self.checked)
        self._planner = Planner(self.graph, self.sources.artifact, self.lock, self, self.outputs.whole, wishes)
        try:
            return self._planner.make(wanted)
        except Misfits as error:
            placed = dict.fromkeys(self._placed(misfit) for misfit in error.found)  # each is said once
            raise RecipeError(list(placed)) from None

    def do_without(self, error: LostObject) -> None:
        """Drop the results that need an object of the store which is lost: the next plan makes them again.

        Raises BrokenPromise if a pinned one is among them: those are made again only when asked for.
        """
        dropped = [result for _, result in self.store.results() if error.sha256 in result.needs()]
        for result in dropped:
            self.store.drop(result, "what it rests on is damaged")
        pins = [(result, self.lock.pins(result.key).get(result.digest)) for result in dropped]
        pinned = [result for result, pin in pins if pin and not self.offered(pin)]
        if pinned:
            raise self._lost_pin(error.message, [str(result.record.get("target", "")) for result in pinned])

    def _placed(self, misfit: Misfit) -> Problem:
        node, use, found, key, source = misfit
        if source:
            return found._replace(place=source_place(self.project, source))
        return problem_at(self.project, node.recipe, node.target, use, found.code, found.message, found.hint, key=key)

    # what planning asks of the project
    def looks(self, step: Step) -> dict[str, Any]:
        return Looks(self.project.root, self.store, self.chronicle, self.holds, self.rely_on).of(step)

    def permits(self, step: Step) -> bool:
        command = step.node.target.raw.get("command")
        return command is None or self.trusting or command in self.project.commands

    # what planning asks of the store
    def known(self, key: str) -> Known:
        return self.store.known(key)

    def table(self, component: Component) -> list[Tensor]:
        return self.sources.glances.get(component.table) or self.store.table(component)

    def vocabulary(self, component: Component) -> dict[str, Any]:
        return self.sources.glances.get(component.table) or self.store.vocabulary(component)

    def relied_on(self) -> set[str]:
        """Return the files and folders on which the last plan rests: sources, outputs, packs (also those not there)."""
        return self.sources.looked_at() | self.outputs.looked_at | {str(path) for path in self._relied}

    def rely_on(self, path: Path) -> None:
        """Note a file that a plan rests on beside sources and outputs."""
        self._relied.add(path)

    def holds(self, result: Result) -> bool:
        return all(self.find(pack) for pack in result.packs)

    def find(self, sha256: str) -> Path | None:
        """Return a file with these bytes, in the store or among the sources."""
        if sha256 in self._found:  # an order asks for the same few files tensor by tensor
            return self._found[sha256]
        path = self.store.find(sha256)
        self._relied.add(path or self.store.object(sha256))
        if path is not None:
            self._found[sha256] = path
        return path

    def one_pass(self, step: Step) -> Pass:
        """Return what the result of a formula will hold, and what of it has to be computed."""
        return one_pass(self.planner(), self._there, step)

    def _there(self, identities: Iterable[str]) -> dict[str, Tensor]:
        """Return the tensors of earlier results whose bytes are there, by identity."""
        found = self.store.tensors(identities)
        files = {tensor.spot.file for tensor in found.values() if tensor.spot}
        there = {file for file in files if self.store.find(file)}
        return {name: tensor for name, tensor in found.items() if tensor.spot and tensor.spot.file in there}

    def offered(self, pin: Pin) -> bool:
        """Say whether the remote cache has a pinned result. One that does not answer is not asked again."""
        if self.sharing is None:
            return False
        try:
            return self.sharing.offers(pin)
        except ResourceError as error:
            self.leave_remote(error)
            return False

    def vouched(self, key: str) -> Pin | None:
        """Return what a trusted key says on the remote cache that a content key came out as, as a pin, or None."""
        if self.sharing is None or self.locked:
            return None
        try:
            return self.sharing.vouched(key)
        except ResourceError as error:
            self.leave_remote(error)
            return None

    def doubts(self) -> list[str]:
        """Say of signed statements on the remote cache, once of each, why they were not believed."""
        found: list[str] = []
        if self.sharing:
            found, self.sharing.doubts = self.sharing.doubts, found
        return found

    def leave_remote(self, error: ForgeError) -> None:
        """Go on without the remote cache."""
        self.sharing = None
        self.unreachable = error

    # -- while building -----------------------------------------------------------------------------------------------

    def inputs_changed(self, step: Step) -> bool:
        """Look once more at the sources that an action has read, directly or through indices over their files."""
        names: set[str] = set()
        for each in (step, *self.planner().within(step)):
            for link, _ in each.inputs:
                other = self.planner().steps.get(link.id)
                names |= {link.id, *(other.makers.values() if other else ())} & self.graph.sources.keys()
        return any(self.sources.changed(self.graph.sources[name]) for name in names)

    def look_again(self) -> None:
        """Forget what sources were, so that the next plan looks at them."""
        for taken in self.graph.sources.values():
            self.sources.forget(taken)

    def quarantine(self, path: Path, step: Step) -> ForgeError | None:
        """Set a damaged object aside, and drop the results that lie in it.

        Returns the error to stop with if a pinned result was among them: those are made again only when asked for.
        """
        error = damaged(path, self.store.root / "quarantine", "its bytes are not what they were")
        lost = [s for s in self.planner().steps.values() if s.result and path.name in s.result.packs]
        for each in lost:
            assert each.result is not None
            self.store.drop(each.result, "its bytes are damaged")
        pinned = [each.id for each in lost if each.pin and not self.offered(each.pin)]
        return self._lost_pin(f"{step.id}: {error.message}", pinned) if pinned else None

    def _lost_pin(self, what: str, targets: list[str]) -> BrokenPromise:
        return BrokenPromise(
            f"{what}; with it the pinned result of {', '.join(targets)} is lost",
            hint=f"`forge build --retrain {targets[0]}` trains it again, and replaces the pin",
        )


def open_session(start: Path, progress: Progress = silent, cache: Path | None = None) -> Session:
    """Open the project in or above a folder, with its own cache or another one. Raises UsageError, RecipeError."""
    root = find_root(start.resolve())
    store = Store(cache or cache_folder(root))
    project = open_project(root, store.index)
    sources = Sources(project, store, progress)
    session = Session(project, store, sources, Outputs(project, store))
    session.read_lock()
    sources.pinned = lambda name: session.lock.sources.get(name, {})
    return session
