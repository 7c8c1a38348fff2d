"""`forge install PRESET --into PROGRAM:PATH`: decide for each file what is to be done, then do it.

No file is overwritten or removed that forge did not put there, or that somebody changed since. Each is put beside its
place under another name and gets its own in one step, after the record has named it.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sdforge.artifact import before_diffusers
from sdforge.errors import BrokenPromise, UsageError, counted, nearest
from sdforge.formats.safetensors import autov3_of
from sdforge.install.layouts import LAYOUTS, Layout
from sdforge.install.record import FOLDER, Put, Record, read_record
from sdforge.outputs import MANIFEST
from sdforge.places import expanded
from sdforge.report.words import glyphs, safe, say, size
from sdforge.session import Session
from sdforge.store.files import Lock, flush_folder, make_folder, resources, sha256_of, share

BESIDE = (".json", ".png", ".jpg", ".jpeg", ".webp", ".txt", ".info")  # how files end that say something of another one
PRESET = r"[a-z][a-z0-9_-]*(@[a-z0-9_-]+)?"

State = Literal["put", "updated", "kept", "shared", "theirs", "removed", "left"]
STAYS = ("kept", "shared", "theirs")
WORDS = {
    "kept": "is there already",
    "shared": "is there already, with the same weights",
    "theirs": "is there already, not from forge: it stays when this is undone",
    "removed": "removed",
    "left": "changed since it was put there: it stays",
}


@dataclass(frozen=True)
class Wanted:
    """A file of a preset that a program reads.

    sha256: of its bytes; small: it is copied, as programs change it; autov3: of what is behind a model's header.
    """

    source: Path
    sha256: str
    small: bool
    autov3: str = ""


@dataclass
class Task:
    """What is done in one folder. files: path within it → what is wanted there; states: path → what becomes of it."""

    layout: Layout
    into: Path
    preset: str
    files: dict[str, Wanted] = field(default_factory=dict)
    passed: list[tuple[str, str]] = field(default_factory=list)  # files that are not put there, and why
    misread: list[str] = field(default_factory=list)  # what the program takes for something else, and the way out
    states: dict[str, State] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)


def install(session: Session, wishes: argparse.Namespace) -> int:
    """Put a preset's files into a program's folder, or take them away again (`--undo`)."""
    program, into = _destination(wishes.into, Path(wishes.at), check=not wishes.undo)
    task = Task(LAYOUTS[program], into, wishes.preset)
    if not wishes.undo:
        _choose(session, task)
    with Lock(session.project.out / FOLDER / "lock"):
        record = read_record(session.project.out, into)
        if wishes.undo:
            _undo(task, record, dry_run=wishes.dry_run)
        else:
            _decide(task, record)
            if not wishes.dry_run:
                _carry_out(task, record, copy=wishes.copy)
    session.store.close()
    _tell(task, program, wishes)
    return 0


# -- where ---------------------------------------------------------------------------------------------------------


def _destination(text: str, at: Path, *, check: bool) -> tuple[str, Path]:
    """Return program and folder of PROGRAM:PATH. Raises UsageError for what is no such program's folder."""
    program, colon, path = text.partition(":")
    if program not in LAYOUTS or not colon or not path:
        guess = nearest(program, list(LAYOUTS))
        hint = f"did you mean {guess}:{path or 'PATH'}?" if guess and guess != program else f"as in {program}:PATH"
        known = ", ".join(LAYOUTS)
        raise UsageError(f"{text!r} is no PROGRAM:PATH", hint if guess else f"PROGRAM is one of {known}")
    into = (at / expanded(path)).resolve()
    if check:
        _refuse_other(program, into)
    return program, into


def _refuse_other(program: str, into: Path) -> None:
    """Refuse a folder in which a program is not installed; say what it misses, and what was probably meant."""
    layout = LAYOUTS[program]
    if not into.is_dir():
        raise UsageError(f"there is no folder {into}", hint=f"name the folder in which {layout.title} lies")
    missing = [mark for mark in layout.marks if not (into / mark).exists()]
    if not missing:
        return
    near = [into.parent, into.parent.parent, *sorted(p for p in into.iterdir() if p.is_dir())]
    meant = [f"{program}:{folder}" for folder in near if _fits(layout, folder)]
    others = [f"{name}:{into}" for name, other in LAYOUTS.items() if _fits(other, into)]
    found = next(iter([*others, *meant]), "")
    hint = f"did you mean --into {found}?" if found else "start the program once, and it makes its folders"
    raise UsageError(f"{into} is no folder of {layout.title}: there is no {' and no '.join(missing)} in it", hint)


def _fits(layout: Layout, folder: Path) -> bool:
    return all((folder / mark).exists() for mark in layout.marks)


# -- what ----------------------------------------------------------------------------------------------------------


def _choose(session: Session, task: Task) -> None:
    """Choose the files that the program reads, and verify them. Raises UsageError, BrokenPromise."""
    root = session.project.out / task.preset
    described = _described(session, root, task.preset)
    rows = {row["path"]: row for row in described["files"]}
    placed = dict(_models(task, rows, grown=bool(described.get("words"))))
    if task.layout.sidecars:
        placed |= _beside(placed, rows)
    for path, target in placed.items():
        if not session.outputs.lies(root / path, rows[path]["sha256"]):
            raise BrokenPromise(
                f"{root / path} is not the file that was written there",
                hint=f"forge build {task.preset} writes it anew",
            )
        small, autov3 = path.endswith(BESIDE), rows[path].get("autov3", "")
        task.files[target] = Wanted(root / path, rows[path]["sha256"], small, autov3)
        if rows[path]["kind"] == "checkpoint":
            task.misread += _misread(task.layout, described, Path(path).stem)
    if not task.files:
        raise UsageError(
            f"{task.preset} has no file that {task.layout.title} reads",
            hint='[preset] export = ["checkpoint", "loras", "embeddings"] writes some',
        )


def _described(session: Session, root: Path, preset: str) -> dict[str, Any]:
    """Return what lies in a preset's folder, as its `preset.json` has it."""
    path = root / "preset.json"
    if not re.fullmatch(PRESET, preset) or not path.is_file():
        known = session.project.recipe_names()
        guess = nearest(preset, known)
        hint = f"did you mean {guess!r}?" if guess else f"there are recipes for {', '.join(known) or 'none'}"
        hint = f"forge build {preset}" if preset.partition("@")[0] in known else hint
        raise UsageError(f"there is no preset {preset!r} in {session.project.out}", hint)
    try:
        described: dict[str, Any] = json.loads(path.read_bytes())
        if "grid" in described:
            raise UsageError(f"{preset} is a sweep, and its folder holds its grid alone", hint=_of_sweep(described))
        if described["v"] != MANIFEST or not all("sha256" in row for row in described["files"]):
            raise ValueError(path)
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} was not written by this forge", hint=f"forge build {preset} writes it anew") from None
    return described


def _of_sweep(described: dict[str, Any]) -> str:
    cells = [str(cell["preset"]) for cell in described["grid"]["cells"]]
    return f"its presets are {cells[0]} … {cells[-1]}" if len(cells) > 1 else f"its preset is {cells[0]}"


def _models(task: Task, rows: dict[str, dict[str, Any]], *, grown: bool) -> Iterator[tuple[str, str]]:
    """Yield the models that the program reads: path in the preset → path in its folder; note the others as passed.

    Of the forms of one artifact it gets the best that it reads, and the diffusers folder where there is no single file.
    grown: whether words were appended to the folder's table.
    """
    chosen: dict[tuple[str, str], tuple[int, str]] = {}
    refused = _against_folder(task.layout, rows, grown=grown)
    for path, row in rows.items():
        kind = row["kind"]
        if kind == "diffusers":
            if not refused:
                yield path, f"{task.layout.whole}/{task.preset}/{path.partition('/')[2]}"
            continue
        if path.endswith(BESIDE):
            continue
        form = Path(path).name[len(_stem(path)) :]
        reads = task.layout.endings.get(kind, ())
        if form not in reads:
            task.passed.append((path, f"{task.layout.title} does not read it"))
            continue
        best = chosen.get((kind, _stem(path)))
        if best is None or reads.index(form) < best[0]:
            chosen[kind, _stem(path)] = (reads.index(form), path)
    if "diffusers/model_index.json" in rows and refused:
        task.passed.append(("diffusers/", refused))
    for (kind, _), (_, path) in chosen.items():
        yield path, f"{task.layout.folders[kind]}/{Path(path).name}"


def _against_folder(layout: Layout, rows: dict[str, dict[str, Any]], *, grown: bool) -> str:
    """Say why the diffusers folder is not put there, or nothing."""
    if any(row["kind"] == "checkpoint" for row in rows.values()):
        return "the single file holds the same"
    if not layout.whole:
        return f"{layout.title} reads no such folders"
    if grown and not layout.grown:
        return f'{layout.title} reads none to which words were appended: export = ["checkpoint", "embeddings"]'
    return ""


def _misread(layout: Layout, described: dict[str, Any], name: str) -> Iterator[str]:
    """Say where the program takes a single file to predict something else, of which it draws nothing but noise."""
    taken = layout.takes.get(str(described.get("family")))
    predicts = described.get("sampler", {}).get("prediction", taken)
    if taken and predicts != taken:
        way = layout.set_right.format(name=name, prediction=predicts)
        yield f"{name} predicts {predicts}, and {layout.title} takes it to predict {taken}: {way}"


def _stem(path: str) -> str:
    """Return the name of a model's file without what says its form."""
    stem = Path(path).name.rpartition(".")[0]
    return before_diffusers(stem) or stem


def _beside(placed: dict[str, str], rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the pictures and texts beside the chosen models: path in the preset → path in the program's folder."""
    found: dict[str, str] = {}
    for path, target in placed.items():
        start = f"{path.rpartition('.')[0]}."
        alike = [other for other in rows if other.startswith(start) and other.endswith(BESIDE)]
        found |= {other: f"{target.rpartition('/')[0]}/{Path(other).name}" for other in alike}
    return found


def _decide(task: Task, record: Record) -> None:
    """Say for each file what becomes of it. Raises UsageError where one would have to be overwritten."""
    refused, owners = [], set()
    there: tuple[str, ...] = ()  # how the paths of what lies beside models begin that stay
    for path, wanted in sorted(task.files.items(), key=lambda found: found[1].small):  # what lies beside models last
        target, row = task.into / path, record.rows.get(path)
        others = [name for name in row.presets if name != task.preset] if row else []
        if not os.path.lexists(target):
            task.states[path] = "put"
        elif _is(target, [wanted.sha256], wanted.source):
            task.states[path] = "kept" if row else "theirs"
        elif row is None:
            refused.append(f"{target}: forge did not write it")
        elif not _is(target, row.digests):
            refused.append(f"{target}: it was changed since forge put it there")
        elif not others:
            task.states[path] = "updated"
        elif _has(target, wanted.autov3) or (wanted.small and path.startswith(there)):
            task.states[path] = "shared"
        else:
            refused.append(f"{target}: it is another one, of {', '.join(others)}")
            owners |= {*others}
        if task.states.get(path) in STAYS:
            there = (*there, f"{path.rpartition('.')[0]}.")
    if refused:
        raise UsageError(
            f"{counted(len(refused), 'file')} would have to be overwritten, so nothing was done:\n  "
            + "\n  ".join(refused),
            hint=f"`--undo` with {', '.join(sorted(owners))} takes away what is in the way"
            if owners
            else "move them away, or give the preset's artifacts other names",
        )
    for path, row in record.rows.items():
        if path not in task.files and task.preset in row.presets:
            task.states[path] = _without(task, path, row)


def _without(task: Task, path: str, row: Put) -> State:
    """Say what becomes of a file that a preset no longer has there."""
    target = task.into / path
    if row.presets != [task.preset]:
        return "kept"
    return "removed" if not os.path.lexists(target) or _is(target, row.digests) else "left"


def _is(target: Path, digests: list[str], source: Path | None = None) -> bool:
    """Say whether a regular file has one of these digests; a link to the source has the source's."""
    if not target.is_file() or target.is_symlink():
        return False
    if source is not None:
        if target.samefile(source):
            return True
        if target.stat().st_size != source.stat().st_size:
            return False
    return sha256_of(target) in digests


def _has(target: Path, autov3: str) -> bool:
    """Say whether a model's file has these weights, whatever its header says of it."""
    return bool(autov3) and autov3_of(target) == autov3


# -- doing it ------------------------------------------------------------------------------------------------------


def _carry_out(task: Task, record: Record, *, copy: bool) -> None:
    """Put, replace and remove. The record names every file before it is there, and lets go of it after it is gone."""
    for path, wanted in task.files.items():
        if task.states[path] == "theirs":
            continue
        row = record.rows.setdefault(path, Put([], []))
        if task.states[path] != "shared":
            row.digests = [wanted.sha256, *(d for d in row.digests if d != wanted.sha256)]
        row.presets = sorted({*row.presets, task.preset})
        record.made += [folder for folder in _missing(task.into, path) if folder not in record.made]
    record.write()
    for path, wanted in task.files.items():
        if task.states[path] in ("put", "updated"):
            replace = task.states[path] == "updated"
            task.how[path] = put(wanted, task.into / path, replace=replace, copy=copy or wanted.small)
    for path in task.files:
        if path in record.rows:
            record.rows[path].digests = record.rows[path].digests[:1]
    _take_away(task, record)


def _missing(into: Path, path: str) -> list[str]:
    """Return the folders on the way to a file that are not there yet, the outermost first."""
    parents = [str(parent) for parent in reversed(Path(path).parents) if str(parent) != "."]
    return [parent for parent in parents if not (into / parent).exists()]


def put(wanted: Wanted, target: Path, *, replace: bool, copy: bool) -> str:
    """Bring a file to its place, whole; return how. Raises UsageError if something has come there meanwhile."""
    with resources(f"{target} cannot be written"):
        make_folder(target.parent)
        part = _part(target)
        part.unlink(missing_ok=True)
        how = _bring(wanted.source, part, copy=copy)
        if replace:
            part.replace(target)
        else:
            _name(part, target)
        part.unlink(missing_ok=True)
        flush_folder(target.parent)
    return how


def _part(target: Path) -> Path:
    return target.with_name(f".{target.name}.forge-part")


def _bring(source: Path, part: Path, *, copy: bool) -> str:
    """Share a file's blocks, else link it, else copy it; a clone comes first since a change to it stays its own."""
    how = "copy"
    if copy:
        shutil.copyfile(source, part)
    else:
        how = share(source, part)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    return how


def _name(part: Path, target: Path) -> None:
    """Give a file its name, unless something has it."""
    try:
        os.link(part, target)
    except FileExistsError:
        part.unlink()
        raise UsageError(f"{target} has come to be meanwhile, and is not overwritten") from None
    except OSError as error:  # a file system without links
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        if os.path.lexists(target):
            part.unlink()
            raise UsageError(f"{target} has come to be meanwhile, and is not overwritten") from None
        part.replace(target)


def _undo(task: Task, record: Record, *, dry_run: bool) -> None:
    """Take away what was put there for a preset. Raises UsageError where nothing was."""
    mine = {path: row for path, row in record.rows.items() if task.preset in row.presets}
    if not mine:
        others = sorted({name for row in record.rows.values() for name in row.presets})
        raise UsageError(
            f"forge has put nothing of {task.preset!r} into {task.into}",
            hint=f"what it put there is of {', '.join(others)}" if others else "",
        )
    task.states |= {path: _without(task, path, row) for path, row in mine.items()}
    if not dry_run:
        _take_away(task, record)


def _take_away(task: Task, record: Record) -> None:
    """Remove what is to go, and folders that were made for it and are empty; then let the record forget them."""
    with resources(f"{task.into} cannot be tidied"):
        for path, state in task.states.items():
            row = record.rows.get(path)
            if row is None or path in task.files:
                continue
            _part(task.into / path).unlink(missing_ok=True)
            if state == "removed":
                (task.into / path).unlink(missing_ok=True)
            row.presets = [name for name in row.presets if name != task.preset]
            if not row.presets:
                del record.rows[path]
        used = {str(parent) for path in record.rows for parent in Path(path).parents}
        for folder in sorted(record.made, key=len, reverse=True):
            if folder not in used:
                _remove_empty(task.into / folder)
                record.made.remove(folder)
    record.write()


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


# -- saying it -----------------------------------------------------------------------------------------------------


def _tell(task: Task, program: str, wishes: argparse.Namespace) -> None:
    if wishes.json:
        rows = [
            {"path": path, "state": state, "how": task.how.get(path, "")} for path, state in sorted(task.states.items())
        ]
        about = {"program": program, "into": str(task.into), "preset": task.preset, "dry_run": wishes.dry_run}
        passed = [{"path": path, "reason": reason} for path, reason in task.passed]
        told = {"files": rows, "passed": passed, "misread": task.misread}
        print(json.dumps({"v": 1, "event": "install", **about, **told}))
        return
    signs = glyphs(sys.stdout)
    wide = max(map(len, task.states))
    for path, state in sorted(task.states.items()):
        sign = signs["warning"] if state == "left" else signs["reuse" if state in STAYS else "build"]
        say(f"  {sign} {path:<{wide}}  {_words(task, path, state, dry_run=wishes.dry_run)}")
    for path, reason in task.passed:
        say(f"  {signs['unneeded']} {path:<{wide}}  not put there: {reason}")
    if words := [task.layout.word.format(name=Path(path).stem) for path in task.files if _is_word(task, path)]:
        say(f"  in prompts there: {', '.join(words)}")
    for sentence in task.misread:
        say(safe(f"  {signs['warning']} {sentence}", sys.stdout))
    if wishes.dry_run:
        say("Nothing was done.")
    elif not wishes.undo and any(state in ("put", "updated") for state in task.states.values()):
        say(safe(f"{task.layout.title}: {task.layout.after}", sys.stdout))


def _is_word(task: Task, path: str) -> bool:
    return path.startswith(f"{task.layout.folders['embedding']}/") and not path.endswith(BESIDE)


def _words(task: Task, path: str, state: State, *, dry_run: bool) -> str:
    if state not in ("put", "updated"):
        return "would be removed" if dry_run and state == "removed" else WORDS[state]
    amount = size(task.files[path].source.stat().st_size)
    if dry_run:
        return f"would be {state}  {amount}"
    return f"{task.how[path]:<9}  {amount}{'  in place of the former one' if state == 'updated' else ''}"
