"""All that a preset's report and card tell, gathered once from plan, store and chronicle: plain values, no layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sdforge.advice import against_licence, licences
from sdforge.artifact import Artifact
from sdforge.chapters import behind, chapter
from sdforge.chronicle import Chapter, Did
from sdforge.drawn import own_column, pictures_of, preset_pictures
from sdforge.dtypes import SAFETENSORS
from sdforge.families import family
from sdforge.graph import Link
from sdforge.licences import combined
from sdforge.placing import description
from sdforge.plan import Plan, Step
from sdforge.report.progress import short, shown_digest
from sdforge.report.sheet import columns
from sdforge.session import Session
from sdforge.store.entries import Result
from sdforge.target import EXPORT, PREVIEWS


@dataclass(frozen=True)
class Source:
    """Something that nobody made. where: as `from` or `path` says; digest: its identity; files: name → sha256."""

    id: str
    kind: str
    where: str
    digest: str
    size: int
    licence: str
    pictures: int = 0
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """A target: did: what the last build did about it; inputs: ids; seconds: that it took when it was made."""

    id: str
    name: str
    method: str
    did: Did
    inputs: list[str]
    seconds: float
    size: int


@dataclass(frozen=True)
class Training:
    """How a training went. losses: of every step; validation: [step, loss]; samples: [step, prompt, sha256]."""

    name: str
    method: str
    steps: int
    seconds: float
    losses: list[float]
    validation: list[tuple[int, float]]
    recommended: int | None
    remark: str
    samples: list[tuple[int, str, str]]


@dataclass(frozen=True)
class Column:
    """Pictures of one checkpoint. role: `base`, `before`, `previous` or `preset`."""

    label: str
    role: str


@dataclass(frozen=True)
class Row:
    """Pictures of one prompt and seed: the sha256 of each column's, or "". seed: None for a sidecar's own picture."""

    prompt: str
    seed: int | None
    note: str
    cells: list[str]


@dataclass(frozen=True)
class Story:
    """A preset as it was last built.

    preset: what `preset.json` says; settings: of the export; drawn_with: of the previews, empty where there are none.
    last, before: the last build and the one before it; lost: whether the pictures of that one are gone from the cache.
    rows: pictures by prompt and seed, a cell for each of the columns.
    asked: what the inputs' licences ask together; against: where the preset's own does not keep it.
    seconds: that all of it took; disk: bytes in `out/`, and in the cache; machine: on which the first of it ran.
    """

    name: str
    title: str
    about: str
    family: str
    dtype: str
    prediction: str
    preset: dict[str, Any]
    settings: dict[str, Any]
    last: Chapter
    before: Chapter | None
    lost: bool
    sources: list[Source]
    made: list[Made]
    trainings: list[Training]
    columns: list[Column]
    rows: list[Row]
    drawn_with: dict[str, Any]
    asked: list[str]
    against: list[str]
    seconds: float
    disk: tuple[int, int]
    machine: dict[str, Any]


def story(session: Session, plan: Plan, recipe: str) -> Story:
    """Gather what there is to tell of a preset whose export (and previews) are made."""
    steps = [step for step in behind(session, plan, recipe) if not step.passes]
    export = plan.steps[f"{recipe}:{EXPORT}"]
    assert export.result is not None
    # the chronicle is lost with the index; what is there is told all the same
    last, *earlier = session.chronicle.past(recipe).builds or [chapter(session, plan, recipe, {}, {})]
    before = earlier[0] if earlier else None
    drawn = plan.steps.get(f"{recipe}:{PREVIEWS}")
    old = pictures_of(session.store, before.pictures) if before and before.pictures else None
    preset = json.loads(description(session, export))
    checkpoint = export.inputs[0][1]
    assert checkpoint is not None
    records = {step.id: _record(session, step) for step in steps}
    given = licences(session, plan, export.id)
    sources = list(_sources(session, steps, given))
    kind, settings = family(export.node.recipe.family), json.loads(export.node.target.settings)
    return Story(
        name=recipe,
        title=settings["title"],
        about=settings["description"] or export.node.recipe.description,
        family=kind.title,
        dtype=_dtype(checkpoint),
        prediction=str(kind.fact(checkpoint.facts, "prediction")),
        preset=preset,
        settings=settings,
        last=last,
        before=before,
        lost=bool(before and before.pictures and old is None),
        sources=sources,
        made=[_made(session, recipe, step, _did(last, step), _inputs(plan, step)) for step in steps],
        trainings=[_training(session, step, records[step.id]) for step in steps if "losses" in records[step.id]],
        columns=list(_columns(drawn, before if old else None)),
        rows=list(_rows(session, drawn, before, old)),
        drawn_with=json.loads(drawn.node.target.settings) if drawn else {},
        asked=combined(list(given.values())),
        against=against_licence(session, plan, export),
        seconds=sum(record.get("seconds", 0.0) for record in records.values()),
        disk=_disk(session, steps),
        machine=next((s.result.fingerprint for s in steps if s.result and s.result.fingerprint), {}),
    )


def _record(session: Session, step: Step) -> dict[str, Any]:
    return session.store.record(step.result) if step.result else {}


def _dtype(checkpoint: Artifact) -> str:
    found = dict.fromkeys(component.dtype for component in checkpoint.components.values() if component.dtype)
    words = {name: word for word, name in SAFETENSORS.items()}
    return ", ".join(words.get(name, name) for name in found)


# -- what it is made from ----------------------------------------------------------------------------------------------


def _sources(session: Session, steps: list[Step], licences: dict[str, str]) -> Iterator[Source]:
    seen: set[str] = set()
    for step in steps:
        for link, artifact in step.inputs:
            if link.id in session.graph.sources and link.id not in seen and artifact is not None:
                seen.add(link.id)
                yield _source(session, link, artifact, licences.get(link.id, ""))


def _source(session: Session, link: Link, artifact: Artifact, licence: str) -> Source:
    taken, notes = session.graph.sources[link.id], artifact.notes
    where = str(taken.table.get("from") or taken.table.get("path", ""))
    return Source(
        link.id,
        artifact.kind,
        where,
        str(notes.get("digest") or artifact.digest or artifact.identity),
        notes.get("size", 0),
        licence,
        len(notes.get("names", {})),
        dict(notes.get("files", {})),
    )


def _made(session: Session, recipe: str, step: Step, did: Did, inputs: list[str]) -> Made:
    record = _record(session, step)
    return Made(
        step.id,
        short(step) if step.node.recipe.name == recipe else step.id,
        step.node.target.signature.name,
        did,
        inputs,
        record.get("seconds", 0.0),
        _size(session, step.result),
    )


def _did(last: Chapter, step: Step) -> Did:
    return last.steps.get(step.id) or Did(step.key, shown_digest(step, step.result), "reused")


def _inputs(plan: Plan, step: Step) -> list[str]:
    """Return the ids of what a step is made from; what its pictures are only compared with is left out."""
    return list(dict.fromkeys(plan.before(link.id) for link, _ in step.inputs if link.use.role != "beside"))


def _size(session: Session, result: Result | None) -> int:
    if result is None:
        return 0
    if result.files:
        return sum(row[1] for row in result.files.values())
    tables = (session.store.table(component) for component in result.components.values() if component.dtype)
    return sum(tensor.size for table in tables for tensor in table)


def _disk(session: Session, steps: list[Step]) -> tuple[int, int]:
    """Return the bytes of the files in `out/`, and of the objects in the cache that hold what was made."""
    files = [step.result for step in steps if step.result and step.node.target.signature.makes in ("files", "pictures")]
    objects = {name for step in steps if step.result for name in step.result.needs()}
    paths = (session.store.object(name) for name in objects)
    return sum(_size(session, each) for each in files), sum(p.stat().st_size for p in paths if p.is_file())


# -- how trainings went ------------------------------------------------------------------------------------------------


def _training(session: Session, step: Step, record: dict[str, Any]) -> Training:
    lines = session.store.bytes_of(record["losses"]).decode(errors="replace").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    found = [(int(at), float(loss)) for at, loss in record.get("validation", [])]
    samples = [(at, prompt, sha256) for at, prompt, sha256 in record.get("samples", []) if _is_kept(session, sha256)]
    return Training(
        short(step),
        step.node.target.signature.name,
        len(losses),
        record.get("seconds", 0.0),
        losses,
        found,
        record.get("recommended") or None,
        str(record.get("remark", "")),
        samples,
    )


def _is_kept(session: Session, sha256: str) -> bool:
    return session.store.object(sha256).is_file()


# -- pictures ----------------------------------------------------------------------------------------------------------


def _columns(drawn: Step | None, before: Chapter | None) -> Iterator[Column]:
    """Yield the columns: bases, what is between, the build before, the preset."""
    if drawn is None or drawn.result is None:
        return
    there = {name.partition("/")[0] for name in drawn.result.files}
    found = [(folder, label) for folder, label in columns(drawn) if folder in there]
    for folder, label in found[:-1]:
        own = folder.startswith(own_column(drawn))
        yield Column(label, "before" if own or label == "before baking" else "base")
    if before is not None:
        yield Column("build before", "previous")
    for _, label in found[-1:]:
        yield Column(label, "preset")


def _rows(session: Session, drawn: Step | None, before: Chapter | None, old: Result | None) -> Iterator[Row]:
    """Yield the rows: every prompt with every seed, then what sidecars draw of their own."""
    if drawn is None or drawn.result is None:
        return
    settings = json.loads(drawn.node.target.settings)
    files = {name: row[0] for name, row in drawn.result.files.items() if _is_kept(session, row[0])}
    there = {name.partition("/")[0] for name in drawn.result.files}
    *others, own = [folder for folder, _ in columns(drawn) if folder in there]
    earlier = _earlier(session, before, old) if before and old else None
    for p, prompt in enumerate(settings["prompts"]):
        for seed in settings["seeds"]:
            stem = f"{p + 1}-{seed}.png"
            cells = [files.get(f"{folder}/{stem}", "") for folder in others]
            cells += [earlier.get((prompt, seed), "")] if earlier is not None else []
            yield Row(prompt, seed, "", [*cells, files.get(f"{own}/{stem}", "")])
    yield from _replays(drawn, files, [*others, *([""] if earlier is not None else []), own])


def _earlier(session: Session, before: Chapter, old: Result) -> dict[tuple[str, int], str]:
    """Return (prompt, seed) → sha256 of the pictures of the preset's own in an earlier build."""
    prompts = (session.store.preimage(old.key) or {}).get("settings", {}).get("prompts", [])
    assert before.pictures is not None
    drawn = preset_pictures(old, before.pictures.column).items() if prompts else ()
    return {(prompts[number - 1], seed): sha for (number, seed), sha in drawn if _is_kept(session, sha)}


def _replays(drawn: Step, files: dict[str, str], folders: list[str]) -> Iterator[Row]:
    """Yield the pictures that sidecars draw by themselves: as they were inverted, and as each prompt edits them."""
    prompts = json.loads(drawn.node.target.settings)["prompts"]
    for link, artifact in drawn.inputs:
        if link.use.role != "sidecars" or artifact is None or artifact.kind != "null_text":
            continue
        for p, prompt in enumerate([artifact.facts["prompt"], *prompts]):
            note = f"{link.use.reference}, {'as it was inverted' if p == 0 else 'edited'}"
            yield Row(
                str(prompt), None, note, [files.get(f"{folder}/{artifact.called}-{p}.png", "") for folder in folders]
            )


def changed_lines(before: str, now: str) -> list[tuple[str, str]]:
    """Return the lines of a text, each with `=`, `+` (new) or `-` (gone) since an earlier one."""
    from difflib import SequenceMatcher

    old, new = before.splitlines(), now.splitlines()
    found: list[tuple[str, str]] = []
    for tag, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            found += [("=", line) for line in new[c:d]]
        else:
            found += [("-", line) for line in old[a:b]] + [("+", line) for line in new[c:d]]
    return found
