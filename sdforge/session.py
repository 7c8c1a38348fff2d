"""One command's view of a project: its graph, sources, store, lock and outputs, and the plan they give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdforge.artifact import Artifact, Tensor, made_artifact
from sdforge.dtypes import ITEM_SIZE
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
from sdforge.families import family
from sdforge.file_layout import pays
from sdforge.graph import Graph, Link, link_recipes, problem_at, source_place
from sdforge.lock import Lock, read_lock
from sdforge.looks import looks
from sdforge.method import method
from sdforge.one_pass import Pass, one_pass
from sdforge.outputs import FAILED, Outputs
from sdforge.picture_advice import advise_pictures
from sdforge.places import LOCK, cache_folder, find_root
from sdforge.plan import Misfit, Misfits, Plan, Planner, Step, Wishes
from sdforge.project import Project, open_project
from sdforge.sources import Progress, Sources, _silent
from sdforge.store import Store
from sdforge.variants import MARK

if TYPE_CHECKING:
    from sdforge.report.beside import Beside
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
    unreachable: str = ""  # why there is no remote cache any more
    _planner: Planner | None = None
    _packs: set[Path] = field(default_factory=set)  # that were asked for, and files that checks name
    _found: dict[str, Path] = field(default_factory=dict)  # sha256 → file, since the last plan was begun

    def share(self, mode: str = "") -> None:
        """Have the remote cache at hand that `[remote]` names; mode: `read`, `write` or `off`, before what it says."""
        remote = self.project.remote
        mode = mode or remote.get("mode", "read")
        if remote.get("address") and mode != "off":
            from sdforge.remotes import open_remote
            from sdforge.sharing import Sharing

            place = open_remote(remote["address"], self.project.root)
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
            raise UsageError(
                "nothing to build: no recipe was named, and forge.toml has no `default`",
                hint=f"there are: {', '.join(self.project.recipe_names()) or 'none'}",
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
                known = [i.partition(":")[2] for i in self.graph.nodes]
                guess = nearest(name, known)
                raise UsageError(
                    f"{name!r} is {'no' if not matches else 'more than one'} target of what is built",
                    hint=f"did you mean {guess!r}?" if guess else "",
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

    def is_settled(self, plan: Plan) -> bool:
        """Say whether there is nothing to note beside the plan: no alias, no row of the lock."""
        from sdforge.lockfile import LockFile

        file = LockFile(self)
        file.check(plan)
        changes = file.changes(plan)
        return not (plan.aliases or plan.notes or changes.sources or changes.targets or changes.results)

    def _owner(self, name: str, recipes: list[str]) -> tuple[str, str]:
        """Find the one recipe that has a target of this name."""
        owners = []
        for recipe in recipes:
            try:
                if name in self.project.recipe(recipe).targets:
                    owners.append(recipe)
            except RecipeError:
                continue
        if len(owners) == 1:
            return owners[0], name
        if owners:
            raise UsageError(
                f"{name!r} is a target of several recipes", hint=" or ".join(f"{r}:{name}" for r in owners)
            )
        guess = nearest(name, recipes)
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
        files = [str(name) for name in ("preset.export", "preset.previews") if name in found.targets]
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
        return looks(self, step)

    def permits(self, step: Step) -> bool:
        command = step.node.target.raw.get("command")
        return command is None or self.trusting or command in self.project.commands

    # what planning asks of the store
    def known(self, key: str) -> Any:
        return self.store.known(key)

    def table(self, component: Any) -> Any:
        return self.sources.glances.get(component.table) or self.store.table(component)

    def vocabulary(self, component: Any) -> Any:
        return self.sources.glances.get(component.table) or self.store.vocabulary(component)

    def relied_on(self) -> set[str]:
        """Return the files and folders on which the last plan rests: sources, outputs, packs (also those not there)."""
        return self.sources.looked_at() | self.outputs.looked_at | {str(path) for path in self._packs}

    def rely_on(self, path: Path) -> None:
        """Note a file that a plan rests on beside sources and outputs."""
        self._packs.add(path)

    def holds(self, result: Any) -> bool:
        return all(self.find(pack) for pack in result.packs)

    def find(self, sha256: str) -> Path | None:
        """Return a file with these bytes, in the store or among the sources."""
        if sha256 in self._found:  # an order asks for the same few files tensor by tensor
            return self._found[sha256]
        path = self.store.find(sha256)
        self._packs.add(path or self.store.object(sha256))
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

    def offered(self, pin: Any) -> bool:
        """Say whether the remote cache has a pinned result. One that does not answer is not asked again."""
        if self.sharing is None:
            return False
        try:
            return self.sharing.offers(pin)
        except ResourceError as error:
            self.leave_remote(error)
            return False

    def vouched(self, key: str) -> Any:
        """Return what a trusted key says on the remote cache that a content key came out as, as a pin, or None."""
        if self.sharing is None or self.locked:
            return None
        try:
            return self.sharing.vouched(key)
        except ResourceError as error:
            self.leave_remote(error)
            return None

    def leave_remote(self, error: ForgeError) -> None:
        """Go on without the remote cache."""
        self.sharing = None
        self.unreachable = error.message

    def last_key(self, step: Step) -> str:
        """Return the plan key with which a target was last built here, or ""."""
        found = self.store.run_noted(f"last:{self.project.root}:{step.id}")
        return str(found or "")

    def note_keys(self, plan: Plan, recipe: str) -> None:
        """Note target → plan key of what is wanted of a recipe and all that it is made from, if any has changed."""
        wanted = [identifier for identifier in plan.wanted if plan.steps[identifier].node.recipe.name == recipe]
        steps = [plan.steps[node.id] for node in self.graph.behind(wanted) if node.id in plan.steps]
        last = self._keys_noted(recipe)
        now = (last[0] if last else {}) | {step.id: step.key for step in steps if step.key}
        if not last or now != last[0]:
            self.store.note_run(f"keys:{self.project.root}:{recipe}", [now, *last[:1]])

    def _keys_noted(self, recipe: str) -> list[dict[str, str]]:
        found: list[dict[str, str]] = self.store.run_noted(f"keys:{self.project.root}:{recipe}") or []
        return found

    def keys_before(self, recipe: str) -> dict[str, str]:
        """Return target → plan key, as a recipe's targets were before the last build of it that changed one of them."""
        return next(iter(self._keys_noted(recipe)[1:]), {})

    def advice(self, plan: Plan, steps: Iterable[Step] | None = None) -> list[Problem]:
        """Return what methods and data sets have to say of their inputs: mistakes, and what may be one.

        steps: of the plan, that are asked; default: all.
        """
        found: list[Problem] = []
        told: set[str] = set()  # sources of which it has been said what is assumed of them
        for step in plan.steps.values() if steps is None else steps:
            if any(artifact is None and link.id in self.graph.sources for link, artifact in step.inputs):
                continue
            target, rows = step.node.target, self._said(plan, step)
            rows += _other_unet(plan, step) if target.signature.makes == "files" else []
            found += self._licence_problems(plan, step) if target.signature.makes == "files" else []
            for link, said in assumed(step):
                if link.id not in told:
                    rows.append((f"{link.use.role}.{link.use.reference}", "unsaid", *said, True))
                told.add(link.id)
            for role, code, message, hint, warning in rows:
                name, _, reference = role.partition(".")
                uses = [link.use for link, _ in step.inputs if link.use.role == name]
                use = next((use for use in uses if reference in ("", use.reference)), None)
                place = (self.project, step.node.recipe, target, use, code, message, hint)
                found.append(problem_at(*place, warning=warning))
        return found

    def _said(self, plan: Plan, step: Step) -> list[tuple[str, str, str, str, bool]]:
        """Return what a method says of its inputs, their words and pictures: (role, code, sentence, hint, warning)."""
        import sdforge.trainings as trainings

        inputs: dict[str, list[Artifact | None]] = {}
        for link, artifact in step.inputs:
            inputs.setdefault(link.use.role, []).append(artifact or _foretold(plan.steps[link.id]))
        target = step.node.target
        found = method(target.signature.name)
        table = found.table.model_validate(target.raw)
        advise, captions = getattr(found.module, "advise", None), getattr(found.module, "CAPTIONS", True)
        rows = list(advise(table, inputs)) if advise else []
        if target.signature.group == "trainings":
            rows += trainings.advise(table, inputs, captions=captions)
        rows += self._words(found.module, table, inputs)
        uncaptioned = getattr(found.module, "UNCAPTIONED", ())
        for link, artifact in step.inputs:
            if artifact is not None and artifact.kind == "dataset":
                role, name = link.use.role, link.use.reference
                read = captions and role not in uncaptioned
                said = advise_pictures(name, artifact, inputs, table, captions=read)
                rows += [(f"{role}.{name}", *each) for each in said]
        return rows

    def licences(self, plan: Plan, end: str) -> dict[str, str]:
        """Return source → licence of all that a target is made from, as stated or as the file says."""
        steps = (plan.steps[node.id] for node in self.graph.behind([end]) if node.id in plan.steps)
        taken = {link.id: artifact for step in steps for link, artifact in step.inputs if link.id in self.graph.sources}
        stated = {name: self.graph.sources[name].table.get("licence", "") for name in taken}
        noted = {name: artifact.notes.get("licence", "") for name, artifact in taken.items() if artifact is not None}
        return {name: licence for name in taken if (licence := str(stated[name] or noted.get(name, "")))}

    def against_licence(self, plan: Plan, export: Step) -> list[str]:
        """Say, input by input, where a preset's own licence does not keep what an input's asks for."""
        from sdforge.licences import conflicts

        return list(conflicts(str(export.node.target.raw["licence"]), self.licences(plan, export.id)))

    def _licence_problems(self, plan: Plan, export: Step) -> Iterator[Problem]:
        hint = "another licence for the preset, or another input; forge only knows what licences commonly say"
        for reason in self.against_licence(plan, export):
            place = (self.project, export.node.recipe, export.node.target, None, "licence", reason, hint)
            yield problem_at(*place, key="licence", warning=True)

    def _words(self, module: Any, table: Any, inputs: dict[str, list[Artifact | None]]) -> list[Any]:
        """Return what a method has to say of new words, once it is known which ones the checkpoint has."""
        advise_words = getattr(module, "advise_words", None)
        on = next(iter(inputs.get("on") or inputs.get("checkpoint", [])), None)
        component = on.components.get("tokenizer") if on is not None else None
        return list(advise_words(table, inputs, self.vocabulary(component))) if advise_words and component else []

    def refuse_mistakes(self, plan: Plan) -> None:
        """Refuse to run what methods say cannot work, before anything runs. Raises RecipeError."""
        mistakes = [problem for problem in self.advice(plan) if not problem.warning]
        if mistakes:
            raise RecipeError(mistakes)

    def warnings(self, plan: Plan) -> list[Problem]:
        """Return what may be a mistake of what is trained now, each sentence once: only hours would show it."""
        trained = [each for each in plan.steps.values() if each.state == "build" and each.kind == "content"]
        found: dict[str, Problem] = {}
        for problem in self.advice(plan, trained):
            if problem.warning:
                found.setdefault(problem.message, problem)
        return list(found.values())

    # -- while building --------------------------------------------------------------------------------------------

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
        from sdforge.store.files import damaged

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

    def place(self, step: Step, work: Path | None) -> tuple[list[str], list[str]]:
        """Put a preset's files into `out/`; return (what had to be moved aside, what lies there now)."""
        assert step.result is not None
        folder, moved, paths = self.outputs.folder(step), [], []
        staging = work or self.store.workplace()
        names = self.outputs.names(step)
        if work is None:
            for file in names if step.node.target.signature.makes == "pictures" else ():
                (staging / file).parent.mkdir(parents=True, exist_ok=True)
                (staging / file).write_bytes(self.store.read_object(step.result.files[file][0]))
        places = []
        for name, source in self.outputs.composed(step):
            made = staging / Path(name).name
            made.write_bytes(self._compose(step, staging))
            places.append((made, name, source))
        places += [(staging / file, name, step.result.files[file][0]) for file, name in names.items()]
        for made, name, source in places:
            if not self.outputs.lies(folder / name, source):
                moved.append(self.outputs.place(folder / name, made, source))
            paths.append(name)
        if work is None:
            shutil.rmtree(staging, ignore_errors=True)
        return [name for name in moved if name], paths

    def show_failed(self, step: Step, *, failed: bool) -> None:
        """Write the previews of a preset that failed its checks to `out/.failed/`, and remove older ones from there."""
        assert step.result is not None
        folder = self.project.out / FAILED / self.outputs.folder(step).name
        shutil.rmtree(folder, ignore_errors=True)
        if not failed:
            return
        staging = self.store.workplace()
        for file, row in step.result.files.items():
            (staging / file).parent.mkdir(parents=True, exist_ok=True)
            (staging / file).write_bytes(self.store.read_object(row[0]))
        (staging / "previews").mkdir()
        (staging / "previews" / "sheet.png").write_bytes(self._compose(step, staging))
        for file, name in self.outputs.names(step).items():
            (staging / file).replace(staging / name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(staging / "previews", folder)
        shutil.rmtree(staging)

    def _compose(self, step: Step, staging: Path) -> bytes:
        from sdforge.report.sheet import contact_sheet

        if step.node.target.signature.makes == "pictures":
            return contact_sheet(step, staging)
        return self.description(step)

    def description(self, export: Step) -> bytes:
        """Return `preset.json` of an export, with what lies beside its files as far as that is known."""
        from sdforge.report.preset import describe_preset

        rows = [each.row() for each in self.beside(export)]
        return describe_preset(export, self.outputs.names(export), rows)

    def beside(self, export: Step) -> list[Beside]:
        """Return what lies beside the files of an export for other programs."""
        from sdforge.report.beside import beside
        from sdforge.report.preset import preset_of

        preset = preset_of(export, self.outputs.names(export))
        drawn = self.planner().steps.get(f"{export.node.recipe.name}:preset.previews")
        return list(beside(preset, json.loads(export.node.target.settings), drawn))

    def bytes_of(self, sha256: str) -> bytes:
        """Return an object of the store; nothing where it is lost, for what can go on without it."""
        try:
            return self.store.read_object(sha256)
        except LostObject:
            return b""

    # -- what it will cost -----------------------------------------------------------------------------------------

    def room(self, plan: Plan) -> tuple[int, int]:
        """Return the bytes that a plan will write, and those that are free."""
        folder = self.store.root if self.store.root.exists() else self.project.root
        return sum(self.bytes_needed(step) for step in plan.to_do), shutil.disk_usage(folder).free

    def refuse_lack(self, plan: Plan) -> None:
        """Refuse what the disk has no room for. Raises ResourceError."""
        needed, free = self.room(plan)
        if needed > free:
            from sdforge.report.words import size

            raise ResourceError(
                f"the build needs about {size(needed)}, and {size(free)} are free",
                hint="`forge clean --dry-run` shows what could go; FORGE_CACHE names another place",
            )

    def bytes_needed(self, step: Step) -> int:
        """Estimate how many bytes a step writes."""
        if any(artifact is None for _, artifact in step.inputs):
            return 0
        if step.kind == "formula":
            try:
                return self.one_pass(step).size()
            except UsageError:
                return 0
        makes, checkpoint = step.node.target.signature.makes, step.inputs[0][1]
        states = self._states_needed(step)
        if makes == "checkpoint" and checkpoint:
            return self.size(checkpoint) + states  # at most: what is not trained passes
        if makes == "files" and checkpoint:
            forms = {"checkpoint", "diffusers"} & set(json.loads(step.node.target.settings)["forms"])
            once = self._written_once(step, checkpoint) if "checkpoint" in forms else 0
            return len(forms) * self.size(checkpoint) - once
        return states

    def _written_once(self, export: Step, checkpoint: Artifact) -> int:
        """Return which bytes of a single file are those that a formula writes for it (see `orders._file_layout`)."""
        steps = self.planner().steps
        planned = [name for name, component in checkpoint.components.items() if component.table.startswith("plan:")]
        maker = steps.get(export.inputs[0][0].id)
        makers = {maker.makers[name] for name in planned} if maker else set()
        if len(makers) != 1:
            return 0
        made = self.bytes_needed(steps[makers.pop()])
        return made if pays(made, self.size(checkpoint)) else 0

    def _states_needed(self, step: Step) -> int:
        """Estimate the bytes of a training's states: those that are kept, and one that is written beside them."""
        from sdforge.run.states import KEPT

        checkpoint = next((artifact for link, artifact in step.inputs if link.use.role == "on"), None)
        if checkpoint is None:
            return 0
        settings = method(step.node.target.signature.name).table.model_validate(step.node.target.raw)
        measure = getattr(settings, "state_bytes", None)
        if measure is None:
            return 0
        of = family(step.node.recipe.family)
        shapes = {name: {t.name: t.shape for t in tensors} for name, tensors in self._tables(checkpoint).items()}
        if not shapes.keys() >= {"unet", *of.text_encoders}:
            return 0
        return (KEPT + 1) * int(measure(of, shapes))

    def size(self, artifact: Artifact) -> int:
        """Return the bytes of an artifact's tensors, also of those that are still to be made."""
        tensors = (tensor for table in self._tables(artifact).values() for tensor in table)
        return sum(prod(tensor.shape) * ITEM_SIZE[tensor.dtype] for tensor in tensors)

    def _tables(self, artifact: Artifact) -> dict[str, list[Tensor]]:
        """Return the tensors of an artifact's networks, as far as they are known."""
        found = {}
        for name, component in artifact.components.items():
            if component.dtype:
                with suppress(UsageError):
                    found[name] = self.planner().tensors(component)
        return found


def _foretold(step: Step) -> Artifact | None:
    """Return what is known of something that is not made yet, where its method's settings decide its facts."""
    signature = step.node.target.signature
    found = method(signature.name)
    tell = getattr(found.module, "facts", None)
    if tell is None:
        return None
    return made_artifact(signature.makes, "", {}, tell(found.table.model_validate(step.node.target.raw)))


def _other_unet(plan: Plan, step: Step) -> Iterator[tuple[str, str, str, str, bool]]:
    """Say which null-text inversions were made with another U-Net than the one that will draw them."""
    checkpoint = next(link.id for link, _ in step.inputs if link.use.role == "checkpoint")
    for link, _ in step.inputs:
        maker = plan.steps.get(link.id)
        if link.use.role != "sidecars" or maker is None or maker.node.target.signature.makes != "null_text":
            continue
        on = next(found for found, _ in maker.inputs if found.use.role == "on")
        if _unet_of(plan, on.id) != _unet_of(plan, checkpoint):
            name = link.use.reference
            text = f"`{name}` was inverted with another U-Net than the preset has, and comes out less like its picture"
            hint = f'on = "{step.node.recipe.preset["checkpoint"] if step.node.recipe.preset else ""}", or no baking'
            yield (f"sidecars.{name}", "base", text, hint, True)


def _unet_of(plan: Plan, identifier: str) -> str:
    """Return the target or source from which a checkpoint has its U-Net; another type of numbers is no other one."""
    while (step := plan.steps.get(identifier)) is not None:
        method_name, roles = step.node.target.signature.name, {link.use.role for link, _ in step.inputs}
        passes = method_name in ("insert", "cast") or (method_name == "swap" and "unet" not in roles)
        if not passes and roles != {"checkpoint", "aesthetics"}:
            break
        identifier = next(link.id for link, _ in step.inputs if link.use.role == "checkpoint")
    return identifier


def assumed(step: Step) -> Iterator[tuple[Link, tuple[str, str]]]:
    """Yield what is assumed of the checkpoints of a step, as nothing says it: which one, a sentence, how to say it."""
    for link, artifact in step.inputs:
        if artifact is not None and "unsaid" in artifact.notes:
            hint = 'state `prediction` beside its `from`: "v_prediction" (768-v and its like), or "epsilon" if it is so'
            yield link, (f"`{link.use.reference}`: {artifact.notes['unsaid']}", hint)


def open_session(start: Path, progress: Progress = _silent) -> Session:
    """Open the project in or above a folder. Raises UsageError, RecipeError."""
    root = find_root(start.resolve())
    store = Store(cache_folder(root))
    project = open_project(root, store.index)
    sources = Sources(project, store, progress)
    session = Session(project, store, sources, Outputs(project, store))
    session.read_lock()
    sources.pinned = lambda name: session.lock.sources.get(name, {})
    return session
