"""`forge diff A B`: what differs between two presets: settings, inputs, tensors by component, pictures.

A and B are recipes, targets, folders of `out/`, or files of models; without B the last build of A before this one.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdforge.artifact import Artifact, Component
from sdforge.describe import made_by
from sdforge.drawn import preset_pictures, previews_in
from sdforge.errors import BrokenPromise, UsageError
from sdforge.explain import shown
from sdforge.formats.layout import read_layout
from sdforge.formats.safetensors import read_header
from sdforge.looking import unbuilt
from sdforge.manifest import changes
from sdforge.names import is_path
from sdforge.orders import closure
from sdforge.places import RECIPES
from sdforge.plan import Plan, Step
from sdforge.report.words import say
from sdforge.session import Session
from sdforge.store.entries import Result
from sdforge.store.files import refuse_nothing, stat_of

DIFFERENT = 10  # the exit code with --exit-code
BEFORE = "before: "  # ahead of what a manifest had of a source that was another one
MOST_NAMED = 3  # tensors of a component, the farthest apart first


@dataclass
class Side:
    """One of two that are compared.

    actions: (name, method, settings) of what lies behind it, inputs first; unnamed: the same as a file tells it, which
    knows no names.
    inputs: identity of a source → what it is called. tensors: component → name → where it lies.
    pictures: (prompt, seed) → file. lost: components whose tensors are not known any more.
    """

    label: str
    actions: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    unnamed: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    pictures: dict[tuple[int, int], Path] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Apart:
    """How far a component is from another one. far: the tensors that differ most: (name, ‖A − B‖).

    tensors: how many both have in one shape; reshaped: those that have another one; only: how many A has, and B.
    distance: ‖A − B‖ over what both have; relative: that by ‖A‖, of the tensors that differ.
    """

    component: str
    tensors: int
    changed: int
    reshaped: list[str]
    only: tuple[int, int]
    distance: float
    relative: float
    largest: float
    far: list[tuple[str, float]]

    @property
    def equal(self) -> bool:
        return not self.changed and not self.reshaped and self.only == (0, 0)


def diff(session: Session, wishes: argparse.Namespace) -> int:
    """Say what differs; return 0, or with `--exit-code` 10 where something does.

    Raises UsageError for what is neither a recipe, a target, a folder of `out/` nor a model's file, or is not built.
    """
    at = Path(wishes.at)
    one, two = _side(session, at, wishes.a), _side(session, at, wishes.b) if wishes.b else None
    if two is None:
        one, two = before(session, wishes.a), one
    found = compared(one, two)
    if wishes.pictures:
        _write_pictures(one, two, at / wishes.pictures)
    if wishes.json:
        print(json.dumps({"v": 1, "event": "diff", "a": one.label, "b": two.label, **found}))
    else:
        for line in told(one, two, found):
            say(line)
        if wishes.pictures:
            say(f"  {wishes.pictures}: {len(one.pictures.keys() & two.pictures.keys())} pairs of pictures")
    return DIFFERENT if wishes.exit_code and not found["equal"] else 0


# -- what is compared --------------------------------------------------------------------------------------------------


def _side(session: Session, at: Path, name: str) -> Side:
    path = at / name
    plain = "/" not in name and "." not in name
    if is_path(name):
        refuse_nothing(path)
    if stat_of(path) is not None and (path.is_file() or not plain):
        return of_path(path, name)
    wanted, step, plan = _end(session, name)
    artifact = _checkpoint(step)
    if artifact is None or not all(c.content for c in artifact.components.values()):
        raise unbuilt(session, step.id, name)
    side = Side(name, _actions(plan, _manifests(plan)), _sources(plan))
    side.unnamed = [each for each in map(_of_manifest, closure(session, step)) if each]
    _list(session, side, artifact.components)
    previews = next((plan.steps[i] for i in wanted if plan.steps[i].node.target.signature.makes == "pictures"), None)
    if previews is not None and previews.result is not None and previews.artifact is not None:
        side.pictures = _drawn(session, previews.result, str(previews.artifact.notes["column"]))
    return side


def _end(session: Session, name: str) -> tuple[list[str], Step, Plan]:
    """Return what a name stands for: the ids that are wanted, the last step of it, and the plan."""
    wanted = session.resolve([name])
    recipes = dict.fromkeys(identifier.partition(":")[0] for identifier in wanted)
    if len(recipes) > 1:
        raise UsageError(f"{name} is a sweep of {len(recipes)} presets", hint=f"two of it: forge diff {_two(recipes)}")
    plan = session.plan(wanted)
    return wanted, plan.steps[wanted[0]], plan


def _two(recipes: Iterable[str]) -> str:
    return " ".join(list(recipes)[:2])


def _checkpoint(step: Step) -> Artifact | None:
    """Return what a step is compared by: a preset's checkpoint, or what a target makes."""
    return step.inputs[0][1] if step.node.target.signature.makes == "files" else step.artifact


def _actions(plan: Plan, manifests: dict[str, dict[str, Any]]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (name, method, settings) of the actions of a plan, as manifests have them."""
    rows = []
    for step in plan.steps.values():
        target, manifest = step.node.target, manifests[step.id]
        if manifest and target.signature.group != "checks" and not target.name.startswith("check."):
            settings = manifest["settings"] | _seed(manifest) | _used(step, manifest)
            rows.append((step.id.partition(":")[2], target.signature.name, settings))
    return rows


def _seed(manifest: dict[str, Any]) -> dict[str, Any]:
    return {"seed": manifest["seed"]} if "seed" in manifest else {}


def _used(step: Step, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return role.NAME → how it is used, of what a manifest lists without names: told by what the artifacts are."""
    found: dict[str, Any] = {}
    for role, spec in step.node.target.signature.roles.items():
        items = [dict(item) for item in manifest["inputs"].get(role, [])] if spec.many == "table" else []
        links = [(link, artifact) for link, artifact in step.inputs if link.use.role == role and artifact is not None]
        left = []
        for link, artifact in links:
            named = json.loads(artifact.named(spec.reads, spec.facts))
            same = next((item for item in items if item["artifact"] == named), None)
            if same is None:
                left.append(link)
                continue
            items.remove(same)
            found[f"{role}.{link.use.reference}"] = same["use"]
        found |= {f"{role}.{link.use.reference}": item["use"] for link, item in zip(left, items, strict=False)}
    return {name: use for name, use in found.items() if use}


def _manifests(plan: Plan) -> dict[str, dict[str, Any]]:
    return {step.id: json.loads(step.manifest or "{}") for step in plan.steps.values()}


def _sources(plan: Plan) -> dict[str, str]:
    links = [pair for step in plan.steps.values() for pair in step.inputs if pair[0].id not in plan.steps]
    return {artifact.identity: link.id for link, artifact in links if artifact is not None}


def _list(session: Session, side: Side, components: dict[str, Component]) -> None:
    """Note where the tensors of components lie."""
    lies = importlib.import_module("sdforge.run.difference").Lies
    for name, component in components.items():
        if not component.dtype:  # words have no tensors
            continue
        try:
            table = session.table(component)
        except BrokenPromise:
            side.lost.append(name)
            continue
        rows = {}
        for tensor in table:
            path = session.find(tensor.spot.file) if tensor.spot else None
            if path is None or tensor.spot is None:
                side.lost.append(name)
                break
            rows[tensor.name] = lies(tensor.dtype, tensor.shape, str(path), tensor.spot.offset, False, tensor.sha256)
        else:
            side.tensors[name] = rows


def _drawn(session: Session, result: Result, column: str) -> dict[tuple[int, int], Path]:
    found = {cell: session.find(sha256) for cell, sha256 in preset_pictures(result, column).items()}
    return {cell: path for cell, path in found.items() if path is not None}


def of_path(path: Path, label: str) -> Side:
    """Return a folder of `out/` or a model's file as a side. Raises UsageError for anything else."""
    side, model = Side(label), path
    if (path / "preset.json").is_file():
        described = _described(path / "preset.json")
        name = str(described.get("preset", path.name))
        if "grid" in described:
            raise UsageError(f"{label} holds the grid of a sweep, and no preset", hint=f"as in forge diff {label}-1 …")
        single, folder = path / f"{name}.safetensors", path / "diffusers"
        model = folder if folder.is_dir() else single  # a single file has no room for words that were added
        side.pictures = previews_in(path, name)
        if single.is_file():
            _read_manifest(side, made_by(read_header(single).metadata))
    elif path.suffix == ".toml":
        recipe = path.parent.name == RECIPES
        hint = f"name the recipe: forge diff {path.stem}" if recipe else "name a recipe, a target or a model"
        raise UsageError(f"{label} is {'the text of a recipe' if recipe else 'no model'}", hint)
    layout = read_layout(model)
    lies = importlib.import_module("sdforge.run.difference").Lies
    for found in layout.tensors:
        place = lies(found.dtype, found.shape, str(layout.files[found.file]), found.offset, found.turned)
        side.tensors.setdefault(found.component, {})[found.name] = place
    if path.is_file():
        _read_manifest(side, made_by(read_header(path).metadata))
    return side


def _described(path: Path) -> dict[str, Any]:
    """Return what stands in a preset's `preset.json`. Raises UsageError for what forge did not write."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is not what forge wrote", hint="`forge build` writes it anew")
    return found


def _read_manifest(side: Side, actions: list[dict[str, Any]]) -> None:
    """Take in how a file of ours says that it was made."""
    for action in actions:
        if "source" in action:
            side.inputs[str(action["source"])] = str(action.get("kind", "source"))
        elif row := _of_manifest(action):
            side.unnamed.append(row)


def _of_manifest(action: dict[str, Any]) -> tuple[str, str, dict[str, Any]] | None:
    """Return an action of a closure as a row without a name, uses by their place in the manifest."""
    manifest = action.get("manifest")
    if not isinstance(manifest, dict):
        return None
    settings = dict(manifest.get("settings", {})) | _seed(manifest)
    for role, items in manifest.get("inputs", {}).items():
        listed = items if isinstance(items, list) else []
        settings |= {
            f"{role}[{i}]": item["use"]
            for i, item in enumerate(listed, 1)
            if isinstance(item, dict) and item.get("use")
        }
    return "", str(manifest.get("method")), settings


def before(session: Session, name: str) -> Side:
    """Return what a preset was before the last build that changed it. Raises UsageError where that is not known."""
    wanted, step, plan = _end(session, name)
    keys, now = session.chronicle.past(step.node.recipe.name).before, _manifests(plan)
    manifests = {i: session.store.preimage(keys.get(i, "")) or {} for i in plan.steps}
    if not manifests[step.id]:
        raise UsageError(f"no earlier build of {name} is known here", hint="`forge diff A B` compares any two")
    side = Side(f"{name} before", _actions(plan, manifests))
    side.inputs = _sources_before(plan, manifests, now)
    known = {c.identity: c for _, result in session.store.results() for c in result.components.values()}
    known |= {c.identity: c for s in plan.steps.values() for _, a in s.inputs if a for c in a.components.values()}
    components = _components_before(manifests[step.id], step, keys, session)
    _list(session, side, {n: known[identity] for n, identity in components.items() if identity in known})
    side.lost += [n for n, identity in components.items() if identity not in known]
    drawn = next((keys.get(i, "") for i in wanted if plan.steps[i].node.target.signature.makes == "pictures"), "")
    if result := _first(session, drawn):
        side.pictures = _drawn(session, result, str(result.facts.get("column", "")))
    return side


def _components_before(manifest: dict[str, Any], step: Step, keys: dict[str, str], session: Session) -> dict[str, str]:
    """Return component → identity of what a step was compared by: its checkpoint, or what it made."""
    if step.node.target.signature.makes == "files":
        found: dict[str, str] = manifest["inputs"]["checkpoint"]["components"]
        return found
    result = _first(session, keys.get(step.id, ""))
    return {name: component.identity for name, component in result.components.items()} if result else {}


def _first(session: Session, key: str) -> Result | None:
    """Return the first result of a plan key, if the store still has one."""
    known = session.store.known(key)
    results = known.results or (session.store.known(known.alias).results if known.alias else [])
    return next(iter(results), None)


def _sources_before(plan: Plan, old: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Return the sources behind a plan as they were: one that was another then has a name of that time."""
    found = {}
    for step in plan.steps.values():
        for link, artifact in step.inputs:
            if link.id in plan.steps or artifact is None or not old[step.id]:
                continue
            was, is_now = (each[step.id]["inputs"].get(link.use.role) for each in (old, now))
            if isinstance(was, list) and isinstance(is_now, list):  # one of several: its neighbours are not it
                place = [other.id for other, _ in step.inputs if other.use.role == link.use.role].index(link.id)
                was, is_now = was[place : place + 1], is_now[place : place + 1]
            same = was == is_now
            found[artifact.identity if same else BEFORE + json.dumps(was, sort_keys=True)] = link.id
    return found


# -- how they differ ---------------------------------------------------------------------------------------------------


def compared(one: Side, two: Side) -> dict[str, Any]:
    """Return what differs, as `--json` has it."""
    settings = list(_settings(one, two))
    inputs: list[list[str]] = []
    if one.inputs and two.inputs:  # else one of them does not tell
        inputs += [[one.inputs[i], i, ""] for i in one.inputs if i not in two.inputs]
        inputs += [[two.inputs[i], "", i] for i in two.inputs if i not in one.inputs]
    names = sorted({*one.tensors, *two.tensors} - {*one.lost, *two.lost})
    components = [_component(name, one.tensors.get(name, {}), two.tensors.get(name, {})) for name in names]
    lost = sorted({*one.lost, *two.lost})
    equal = not (settings or inputs or lost) and all(each.equal for each in components)
    return {
        "equal": equal,
        "settings": settings,
        "inputs": sorted(inputs),
        "components": [each.__dict__ for each in components],
        "lost": lost,
        "pictures": [[number, seed, *map(str, pair)] for (number, seed), pair in sorted(pairs(one, two).items())],
    }


def pairs(one: Side, two: Side) -> dict[tuple[int, int], tuple[Path, Path]]:
    """Return (prompt, seed) → the pictures of both."""
    return {cell: (one.pictures[cell], two.pictures[cell]) for cell in one.pictures.keys() & two.pictures.keys()}


def _settings(one: Side, two: Side) -> Iterator[list[Any]]:
    """Yield [action, setting, value in A, value in B] where they differ; None is «not there»."""
    named = bool(one.actions and two.actions)
    first, second = (_aligned(side.actions if named else side.unnamed) for side in (one, two))
    if not first or not second:  # a file that does not tell how it was made
        return
    for name in [*first, *(name for name in second if name not in first)]:
        if name not in first or name not in second:
            yield [name, "", name in first or None, name in second or None]
            continue
        for change in changes(first[name], second[name]):
            yield [name, ".".join(change.path), change.old, change.new]


def _aligned(actions: list[tuple[str, str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return actions by name, or by method and count where they have none."""
    found: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    for name, method, settings in actions:
        counts[method] = counts.get(method, 0) + 1
        found[name or (method if counts[method] == 1 else f"{method} {counts[method]}")] = {"method": method} | settings
    return found


def _component(name: str, one: dict[str, Any], two: dict[str, Any]) -> Apart:
    """Compare a component tensor by tensor."""
    module = importlib.import_module("sdforge.run.difference")
    shared = [tensor for tensor in one if tensor in two]
    both = [tensor for tensor in shared if one[tensor].shape == two[tensor].shape]
    squares, first, largest, far = 0.0, 0.0, 0.0, []
    for tensor in both:
        apart = module.apart(one[tensor], two[tensor])
        squares, largest = squares + apart.difference, max(largest, apart.largest)
        if apart.difference:
            first += apart.first
            far.append((tensor, module.norm(apart.difference)))
    far.sort(key=lambda row: -row[1])
    distance = module.norm(squares)
    return Apart(
        name,
        len(both),
        len(far),
        [tensor for tensor in shared if tensor not in both],
        (len(one) - len(shared), len(two) - len(shared)),
        distance,
        distance / module.norm(first) if first else 0.0,
        largest,
        far[:MOST_NAMED],
    )


# -- telling -----------------------------------------------------------------------------------------------------------


def told(one: Side, two: Side, found: dict[str, Any]) -> Iterator[str]:
    """Yield lines for a person."""
    yield f"{one.label} → {two.label}"
    for action, setting, old, new in found["settings"]:
        if setting:
            yield f"  {action}.{setting} {shown(old)} → {shown(new)}"
        else:
            yield f"  {'-' if old else '+'} {action}"
    for name, old, new in found["inputs"]:
        identity = "as it was" if old.startswith(BEFORE) else (old or new)[:12]
        yield f"  {'-' if old else '+'} input {name} ({identity})"
    for each in found["components"]:
        yield from _component_told(each)
    for name in found["lost"]:
        yield f"  {name}: its tensors are not here any more"
    if found["equal"]:
        yield "  they are equal"


def _component_told(each: dict[str, Any]) -> Iterator[str]:
    if each["only"][0] or each["only"][1]:
        yield f"  {each['component']}: {each['only'][0]} tensors only in A, {each['only'][1]} only in B"
    for name in each["reshaped"]:
        yield f"  {each['component']}: {name} has another shape"
    if each["changed"]:
        yield (
            f"  {each['component']}: {each['changed']} of {each['tensors']} tensors differ, by {each['distance']:.3g} "
            f"({100 * each['relative']:.2g} % of their norm), at most {each['largest']:.3g}"
        )
        for name, far in each["far"]:
            yield f"      {far:.3g}  {name}"


def _write_pictures(one: Side, two: Side, path: Path) -> None:
    """Write the pictures of both side by side. Raises UsageError where there are none that show the same."""
    from sdforge.report.sheet import pair_sheet

    if path.suffix != ".png":
        raise UsageError(f"{path} is no name for a picture", hint="they are written as FILE.png")
    found = pairs(one, two)
    if not found:
        raise UsageError("no two pictures are of the same prompt and seed", hint="[preset.previews] says what is drawn")
    path.write_bytes(pair_sheet((one.label, two.label), found))
