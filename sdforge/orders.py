"""A step of the plan → the order that is handed to a runner: every input's bytes by file and offset."""

from __future__ import annotations

import heapq
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdforge.artifact import Artifact, Component, Tensor
from sdforge.drawn import Pictures, pictures_in, pictures_of, preset_pictures
from sdforge.errors import BrokenPromise, UsageError
from sdforge.file_layout import FileLayout, Laid, pays
from sdforge.formats.kohya import SETTINGS
from sdforge.graph import Link
from sdforge.identity import digest_of_text
from sdforge.method import module_of
from sdforge.one_pass import Computed, Pass
from sdforge.order import Computation, Given, Order
from sdforge.plan import Step
from sdforge.ref import Ref
from sdforge.target import Target

if TYPE_CHECKING:
    from sdforge.session import Session


def make_order(
    session: Session,
    step: Step,
    key: str,
    manifest: str,
    work: Path,
    how: dict[str, Any],
    formula: Pass | None = None,
) -> Order:
    """Return the order for a step whose inputs are all there. Raises BrokenPromise if a file has gone.

    formula: what a formula's result will hold.
    """
    target = step.node.target
    stated = json.loads(manifest)
    settings = stated["settings"] | ({"seed": stated["seed"]} if "seed" in stated else {})
    inputs: dict[str, list[Given]] = {}
    compute = [] if formula is None else _computations(session, formula)
    if formula is None:
        for link, artifact in step.inputs:
            assert artifact is not None
            inputs.setdefault(link.use.role, []).append(_given(session, step, link, artifact))
        for role, spec in target.signature.roles.items():
            if spec.many == "table" and role in inputs:
                inputs[role].sort(key=lambda given: (given.identity, json.dumps(given.use, sort_keys=True)))
    if target.signature.group == "checks":
        how = how | {"root": str(session.project.root)}
        if before := stated.get("looks", {}).get("previous"):
            inputs["previous"] = [_earlier(session, step, Pictures(*before))]
    makes_files = target.signature.makes == "files"
    return Order(
        key=key,
        target=step.id,
        method=target.signature.name,
        group=target.signature.group,
        family=step.node.recipe.family,
        settings=settings,
        work=str(work),
        inputs=inputs,
        compute=compute,
        states=str(state_folder(session, step, manifest)) if keeps_states(step) else "",
        derived=str(session.store.derived()),
        how=how,
        closure=closure(session, step) if makes_files else [],
        layout=None if formula is None else _file_layout(session, step, formula),
        written=_written(session, step) if makes_files else {},
    )


def _written(session: Session, step: Step) -> dict[str, Laid]:
    """Return the packs that may be, byte for byte, the file that an export makes of the checkpoint in them."""
    checkpoint = step.inputs[0][1]
    assert checkpoint is not None
    components = [c for name, c in checkpoint.components.items() if not name.startswith("tokenizer")]
    packs = {t.spot.file for component in components for t in session.store.table(_made(component)) if t.spot}
    return {key: Laid(*row) for key, row in session.store.laid(packs).items()}


def _file_layout(session: Session, step: Step, formula: Pass) -> FileLayout | None:
    """Return the file that an export will make of what a formula makes, if one waits for nothing else.

    None, too, where the formula makes too little of it to pay.
    """
    from sdforge.edits.export import single_layout

    planner = session.planner()
    for export in planner.steps.values():
        if export.node.target.signature.makes != "files" or not (export.to_do or export.restore):
            continue
        settings = json.loads(export.manifest or "{}").get("settings", {})
        if "checkpoint" not in settings.get("forms", ()) or any(artifact is None for _, artifact in export.inputs):
            continue
        link, checkpoint = export.inputs[0]
        maker = planner.steps.get(link.id)
        assert checkpoint is not None
        planned = [name for name, c in checkpoint.components.items() if c.table.startswith("plan:")]
        if not planned or maker is None or any(_key(session, maker.makers[name]) != step.key for name in planned):
            continue
        given, passing = _foreseen(session, export, link, checkpoint, formula)
        order = Order(
            export.key,
            export.id,
            export.node.target.signature.name,
            export.node.target.signature.group,
            export.node.recipe.family,
            settings,
            "",
            {link.use.role: [given]},
            closure=closure(session, export),
        )
        try:
            layout = single_layout(order)._replace(passing=passing)
        except UsageError:  # the export itself will say so
            return None
        whole = sum(map(layout.size, layout.shapes))
        return layout if pays(whole - sum(ref.size for ref in passing.values()), whole) else None
    return None


def _key(session: Session, identifier: str) -> str:
    step = session.planner().steps.get(identifier)
    return step.key if step else ""


def _foreseen(
    session: Session, export: Step, link: Link, checkpoint: Artifact, formula: Pass
) -> tuple[Given, dict[str, Ref]]:
    """Return a checkpoint as an export will read it, and where those of its tensors lie that are not computed."""
    reads, paths = export.node.target.role(link.use.role).reads, dict[str, Path]()
    components: dict[str, list[Ref]] = {}
    passing: dict[str, Ref] = {}
    vocabulary: dict[str, Any] = {}
    for name, component in checkpoint.components.items():
        if not name.startswith(reads or ("\0",)):
            continue
        if name.startswith("tokenizer"):
            vocabulary = session.vocabulary(component)
            continue
        for row in formula.rows[name] if component.table.startswith("plan:") else session.table(component):
            if isinstance(row, Computed):
                ref = Ref(row.tensor.name, row.tensor.dtype, row.tensor.shape, "", 0, "")
            else:
                ref = passing[f"{name}.{row.name}"] = _ref(session, row, paths)
            components.setdefault(name, []).append(ref)
    given = Given(checkpoint.kind, checkpoint.identity, checkpoint.facts, components, vocabulary=vocabulary)
    return given, passing


def keeps_states(step: Step) -> bool:
    """Say whether an action goes on where it was stopped: a training, and an edit that takes long."""
    signature = step.node.target.signature
    if signature.group == "edits":
        return getattr(module_of("edits", signature.name), "KEEPS_STATE", False)
    return signature.group == "trainings"


def state_folder(session: Session, step: Step, manifest: str) -> Path:
    """Return where an action's states lie. One that is made again has its own: it starts from nothing."""
    name = state_key(json.loads(manifest))
    return session.store.states(f"{name}-again" if step.id in session.retrain else name)


def state_key(manifest: dict[str, Any]) -> str:
    """Name an action's states: without `steps` where nothing computed depends on the total."""
    settings = dict(manifest["settings"])
    if settings.get("schedule") == "constant":  # one that has none counts its steps otherwise
        settings.pop("steps", None)
    text = json.dumps(manifest | {"settings": settings}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return digest_of_text("state", text)


def _ref(session: Session, tensor: Tensor, paths: dict[str, Path]) -> Ref:
    """Return where a tensor is read. paths: files that were found already, by sha256."""
    assert tensor.spot is not None
    path = paths.get(tensor.spot.file) or session.find(tensor.spot.file)
    if path is None:
        raise BrokenPromise(
            f"the file with {tensor.name} ({tensor.spot.file[:12]}) is not there any more",
            hint="was a source changed or removed? `forge plan` looks again",
        )
    paths[tensor.spot.file] = path
    return Ref(tensor.name, tensor.dtype, tensor.shape, str(path), tensor.spot.offset, tensor.xxh3)


def _computations(session: Session, formula: Pass) -> list[Computation]:
    paths: dict[str, Path] = {}

    def taken(component: str, row: Tensor | Computed) -> Ref | Computation:
        return computation(component, row) if isinstance(row, Computed) else _ref(session, row, paths)

    def computation(component: str, row: Computed) -> Computation:
        tensor, inputs = row.tensor, tuple(taken(component, each) for each in row.inputs)
        return Computation(component, tensor.name, tensor.dtype, tensor.shape, row.method, row.parameters, inputs)

    return [computation(name, row) for name, rows in formula.rows.items() for row in rows if isinstance(row, Computed)]


def _given(session: Session, step: Step, link: Link, artifact: Artifact) -> Given:
    if artifact.kind in ("dataset", "picture"):
        files = _picture_files(session, link, artifact)
        # a mask is named by its file too, or by a word
        pictures = [
            [files[sha256], sha256, caption, repeats, *(files.get(m, m) for m in mask)]
            for sha256, caption, repeats, *mask in artifact.notes["rows"]
        ]
        return Given(artifact.kind, artifact.identity, pictures=pictures, held_out=artifact.notes.get("validation", 0))
    if artifact.kind == "pictures":
        noted = pictures_in(artifact)
        return _drawn(session, session.planner().steps[link.id].node.target, noted)
    reads = step.node.target.role(link.use.role).reads
    components: dict[str, list[Ref]] = {}
    vocabulary: dict[str, Any] = {}
    paths: dict[str, Path] = {}
    for name, component in artifact.components.items():
        if not name.startswith(reads or ("\0",)):
            continue
        if name.startswith("tokenizer"):
            vocabulary = session.store.vocabulary(component)
        else:
            components[name] = [_ref(session, tensor, paths) for tensor in session.store.table(_made(component))]
    use = dict(link.use.use or {})
    if step.node.target.signature.makes == "files":
        use |= artifact.stated()
        if artifact.kind == "lora":
            own = link.id not in session.graph.sources
            use |= {"settings": _trained_with(session, link)} if own else {"elsewhere": True}
    return Given(
        artifact.kind,
        artifact.digest or artifact.identity,
        artifact.facts,
        components,
        {name: component.identity for name, component in artifact.components.items()},
        vocabulary,
        use,
    )


def _drawn(session: Session, target: Target, pictures: Pictures) -> Given:
    """Return previews as checks look at them: rows of [path, sha256, prompt, its number from 1, seed].

    target: that drew them, or draws the same prompts. Raises BrokenPromise for one that is not there any more.
    """
    prompts, rows, result = json.loads(target.settings)["prompts"], [], pictures_of(session.store, pictures)
    found = preset_pictures(result, pictures.column) if result else {}
    for (number, seed), sha256 in sorted(found.items()):
        path = session.find(sha256)
        if path is None:
            raise BrokenPromise(f"a picture ({sha256[:12]}) is not there any more", hint="`forge build` draws it again")
        rows.append([str(path), sha256, prompts[number - 1] if number <= len(prompts) else "", number, seed])
    return Given("pictures", pictures.digest, pictures=rows)


def _earlier(session: Session, step: Step, pictures: Pictures) -> Given:
    """Return an earlier build's pictures, with the prompts that they state themselves."""
    from PIL import Image

    link = next(link for link, artifact in step.inputs if artifact is not None and artifact.kind == "pictures")
    given = _drawn(session, session.planner().steps[link.id].node.target, pictures)
    for row in given.pictures:
        with Image.open(row[0]) as picture:
            row[2] = str(picture.info.get("parameters", "")).partition("\nNegative prompt:")[0].partition("\nSteps:")[0]
    return given


def _picture_files(session: Session, link: Link, artifact: Artifact) -> dict[str, str]:
    """Return sha256 → path of the pictures of a data set: a folder's, or those that an action made."""
    if link.id in session.graph.sources:
        return session.sources.picture_files(session.graph.sources[link.id])
    found = {row[0]: session.find(row[0]) for row in artifact.notes["rows"]}
    gone = [sha256 for sha256, path in found.items() if path is None]
    if gone:
        raise BrokenPromise(f"a picture of {link.id} ({gone[0][:12]}) is not there any more")
    return {sha256: str(path) for sha256, path in found.items()}


def _made(component: Component) -> Component:
    if component.table.startswith("plan:"):
        raise BrokenPromise(f"component {component.identity[:12]} was to be made first")
    return component


def _trained_with(session: Session, link: Link) -> dict[str, Any]:
    """What kohya's metadata wants to know of a LoRA that a target trained."""
    manifest = json.loads(session.planner().steps[link.id].manifest or "{}")
    settings = manifest.get("settings", {}) | {key: manifest[key] for key in ("seed",) if key in manifest}
    return {theirs: settings[ours] for ours, theirs in SETTINGS.items() if ours in settings}


def closure(session: Session, step: Step) -> list[dict[str, Any]]:
    """Return everything behind a step, sources first, without a name: equal presets have equal closures.

    Numbered in topological order, ties by lineage. A source is its identity; an action is its manifest, the digest of
    its result where it was trained, and the numbers of its inputs.
    """
    steps = session.planner().steps
    entries: dict[str, tuple[str, dict[str, Any], list[tuple[str, str, bool]]]] = {}
    stack: list[Step] = [step]
    while stack:
        current = stack.pop()
        roles = current.node.target.signature.roles
        for link, artifact in current.inputs:
            if artifact is None or link.id in entries:
                continue
            if link.id in session.graph.sources:
                entries[link.id] = (artifact.identity, {"source": artifact.identity, "kind": artifact.kind}, [])
            else:
                stack.append(steps[link.id])
        if current is not step and current.id not in entries:
            inputs = [(link.use.role, link.id, roles[link.use.role].many == "table") for link, _ in current.inputs]
            described: dict[str, Any] = {"method": current.node.target.signature.name}
            if current.manifest:
                described = {"manifest": json.loads(current.manifest)}
            chosen = current.result or current.pin
            if current.kind == "content" and chosen:  # of all it holds, what merely passed may not be here in bytes
                described["digest"] = chosen.digest
            entries[current.id] = (current.lineage, described, inputs)
    return _numbered(entries)


def _numbered(entries: dict[str, tuple[str, dict[str, Any], list[tuple[str, str, bool]]]]) -> list[dict[str, Any]]:
    waiting = {name: {other for _, other, _ in inputs} for name, (_, _, inputs) in entries.items()}
    ready = [(entries[name][0], name) for name, inputs in waiting.items() if not inputs]
    heapq.heapify(ready)
    numbers: dict[str, int] = {}
    result: list[dict[str, Any]] = []
    by_key: dict[str, int] = {}
    while ready:
        key, name = heapq.heappop(ready)
        if key in by_key:  # two names of one thing
            numbers[name] = by_key[key]
        else:
            numbers[name] = by_key[key] = len(result)
            inputs: dict[str, list[int]] = {}
            for role, other, unordered in entries[name][2]:
                inputs.setdefault(role, []).append(numbers[other])
                if unordered:
                    inputs[role].sort()
            result.append(entries[name][1] | ({"inputs": inputs} if inputs else {}))
        for other, left in waiting.items():
            if name in left:
                left.discard(name)
                if not left:
                    heapq.heappush(ready, (entries[other][0], other))
    return result
