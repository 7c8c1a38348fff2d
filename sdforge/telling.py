"""What a build writes last: report, card, descriptions, and what other programs read beside a preset's files.

None of it decides a result or is pinned. It is written when it is not there as it was made, and after every build that
did something about the preset.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdforge.chapters import behind, presets
from sdforge.outputs import COMPOSED
from sdforge.placing import description, files_beside
from sdforge.plan import Plan, Step
from sdforge.report.beside import Beside
from sdforge.report.progress import shown_digest
from sdforge.session import Session
from sdforge.target import EXPORT, PREVIEWS

VERSION = 1  # of the report's and card's layout: raised, they are written anew
REPORT, CARD = "report.html", "card.md"
TEXTS = (REPORT, CARD, "civitai.html", "civitai.txt")


def is_told(session: Session, plan: Plan) -> bool:
    """Say whether all that is told of the presets in a plan lies in `out/` as it was written."""
    return all(_is_told(session, plan, name) for name in presets(plan))


def _is_told(session: Session, plan: Plan, recipe: str) -> bool:
    export = plan.steps[f"{recipe}:{EXPORT}"]
    folder, made_from = session.outputs.folder(export), _made_from(session, plan, recipe)
    # every one is looked at, since a verdict rests on all of them
    found = [session.outputs.lies(folder / name, made_from) for name in TEXTS]
    found += [session.outputs.lies(folder / each.path, each.sha256) for each in files_beside(session, export)]
    return all(found)


def tell(session: Session, plan: Plan, recipe: str) -> list[str]:
    """Write report, card and what lies beside a preset's files; return what had to be moved aside.

    Raises ResourceError.
    """
    from sdforge.report.card import card, civitai_description, civitai_fields
    from sdforge.report.page import page
    from sdforge.report.story import story

    export = plan.steps[f"{recipe}:{EXPORT}"]
    folder, made_from = session.outputs.folder(export), _made_from(session, plan, recipe)
    told = story(session, plan, recipe)
    texts = {
        CARD: card(told),
        "civitai.html": civitai_description(told),
        "civitai.txt": civitai_fields(told),
        REPORT: page(told, session.store.bytes_of, folder),
    }
    (source,) = (source for name, source in session.outputs.composed(export) if name == "preset.json")
    beside = files_beside(session, export)
    files = [(each.path, each.data or _drawn(session, plan, recipe, each), each.sha256) for each in beside]
    files += [("preset.json", description(session, export), source)]
    files += [(name, text.encode(), made_from) for name, text in texts.items()]
    staging, moved = session.store.workplace(), []
    try:
        for name, data, expected in files:
            if _is_there(session, folder / name, data, expected):  # so that one who is often stopped comes to an end
                continue
            made = staging / Path(name).name
            made.write_bytes(data)
            moved.append(session.outputs.place(folder / name, made, expected))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return [name for name in moved if name]


def _is_there(session: Session, path: Path, data: bytes, expected: str) -> bool:
    return session.outputs.lies(path, expected) and path.read_bytes() == data


def _drawn(session: Session, plan: Plan, recipe: str, each: Beside) -> bytes:
    result = plan.steps[f"{recipe}:{PREVIEWS}"].result
    assert result is not None
    return session.store.read_object(result.files[each.drawn][0])


def _made_from(session: Session, plan: Plan, recipe: str) -> str:
    """Name what the texts are made from: results, and what is stated of sources."""
    return COMPOSED + json.dumps([VERSION, list(_parts(session, behind(session, plan, recipe)))])


def _parts(session: Session, steps: list[Step]) -> Iterator[list[Any]]:
    for step in steps:
        yield [step.id, shown_digest(step, step.result)]
        for link, _ in step.inputs:
            if link.id in session.graph.sources:
                table = session.graph.sources[link.id].table
                yield [link.id, table.get("from", ""), table.get("path", ""), table.get("licence", "")]
