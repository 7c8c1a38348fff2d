"""How the files of presets get from the store to `out/`, and what is put together from them there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from sdforge.grids import ABOUT, PICTURE, describe, grids_of, lies
from sdforge.outputs import FAILED, Outputs
from sdforge.plan import Plan, Step
from sdforge.report.beside import Beside, beside
from sdforge.report.preset import describe_preset, preset_of
from sdforge.session import Session
from sdforge.target import PREVIEWS


def place(session: Session, step: Step, work: Path | None) -> tuple[list[str], list[str]]:
    """Put a preset's files into `out/`; return (what had to be moved aside, what lies there now).

    work: where the action has just written them; None: they are read from the store, or lie in `out/` already.
    Raises LostObject, ResourceError.
    """
    assert step.result is not None
    folder, moved, paths = session.outputs.folder(step), [], []
    staging = work or session.store.workplace()
    names = session.outputs.names(step)
    if work is None and step.node.target.signature.makes == "pictures":
        _draw_from_store(session, step, staging)
    places = []
    for name, source in session.outputs.composed(step):
        made = staging / Path(name).name
        made.write_bytes(_composed(session, step, staging))
        places.append((made, name, source))
    places += [(staging / file, name, step.result.files[file][0]) for file, name in names.items()]
    for made, name, source in places:
        if not session.outputs.lies(folder / name, source):
            moved.append(session.outputs.place(folder / name, made, source))
        paths.append(name)
    if work is None:
        shutil.rmtree(staging, ignore_errors=True)
    return [name for name in moved if name], paths


def show_failed(session: Session, step: Step, *, failed: bool) -> None:
    """Write the previews of a preset that failed its checks to `out/.failed/`, and remove older ones from there."""
    assert step.result is not None
    folder = session.project.out / FAILED / session.outputs.folder(step).name
    if not failed:
        shutil.rmtree(folder, ignore_errors=True)
        return
    staging = session.store.workplace()
    _draw_from_store(session, step, staging)
    (staging / "previews").mkdir()
    (staging / "previews" / "sheet.png").write_bytes(_composed(session, step, staging))
    for file, name in session.outputs.names(step).items():
        (staging / file).replace(staging / name)
    with session.outputs.lock() as lock:
        lock.acquire(wait=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(staging / "previews", folder)
    shutil.rmtree(staging)


def write_grids(session: Session, plan: Plan, outputs: Outputs) -> Iterator[tuple[Path, list[str]]]:
    """Draw what is lacking of grids whose cells are drawn; yield where each lies, and what had to be moved aside."""
    from sdforge.report.grid import draw_grid  # loads Pillow

    for grid in grids_of(session, plan):
        if not all(step.result for step in grid.cells) or lies(outputs, grid):
            continue
        staging, folder = session.store.workplace(), outputs.project.out / grid.name
        moved = []
        for name, content in ((PICTURE, draw_grid(grid, session.store.read_object)), (ABOUT, describe(grid))):
            (staging / name).write_bytes(content)
            moved.append(outputs.place(folder / name, staging / name, grid.source()))
        staging.rmdir()
        yield folder / PICTURE, [name for name in moved if name]


def _draw_from_store(session: Session, step: Step, staging: Path) -> None:
    """Write the pictures of a result into a folder, under their names in the result."""
    assert step.result is not None
    for file, row in step.result.files.items():
        (staging / file).parent.mkdir(parents=True, exist_ok=True)
        (staging / file).write_bytes(session.store.read_object(row[0]))


def _composed(session: Session, step: Step, staging: Path) -> bytes:
    """Return the contact sheet of previews that lie in `staging`, or the description of an export."""
    from sdforge.report.sheet import contact_sheet  # loads Pillow

    if step.node.target.signature.makes == "pictures":
        return contact_sheet(step, staging)
    return description(session, step)


def description(session: Session, export: Step) -> bytes:
    """Return `preset.json` of an export, with what lies beside its files as far as that is known."""
    rows = [each.row() for each in files_beside(session, export)]
    return describe_preset(export, session.outputs.names(export), rows)


def files_beside(session: Session, export: Step) -> list[Beside]:
    """Return what lies beside the files of an export for other programs."""
    preset = preset_of(export, session.outputs.names(export))
    drawn = session.planner().steps.get(f"{export.node.recipe.name}:{PREVIEWS}")
    return list(beside(preset, json.loads(export.node.target.settings), drawn))
