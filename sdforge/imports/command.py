"""`forge import FILE`: write the recipe that does what another program's file says, and check it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType

from sdforge.commands import check
from sdforge.errors import ForgeError, UsageError
from sdforge.families import family_names
from sdforge.graph import Taken
from sdforge.imports import block_weights, kohya, mecha, mergekit
from sdforge.imports.draft import Draft, Wishes, plain_name, text_of
from sdforge.names import hint_at_name, is_name
from sdforge.places import RECIPES
from sdforge.report.words import say
from sdforge.session import Session, open_session
from sdforge.store.files import publish_bytes
from sdforge.tables import Source

KINDS: tuple[ModuleType, ...] = (mecha, mergekit, kohya, block_weights)  # the first that recognises a file reads it


def import_recipe(session: Session, wishes: argparse.Namespace) -> int:
    """Write recipes/NAME.toml, or with --dry-run print it. Returns the exit code of the check."""
    path = Path(wishes.at) / wishes.file
    try:
        draft = _draft(session, path, wishes)
        text = draft.text(path.name)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        about = " ".join(str(error).split())
        raise UsageError(f"{path} is not written as such files are: {type(error).__name__}: {about}") from None
    if wishes.dry_run:
        print(json.dumps({"v": 1, "event": "import", "text": text}) if wishes.json else text, end="\n" * wishes.json)
        return 0
    place = session.project.recipe_path(_name(session, wishes.name or plain_name(path.stem)))
    publish_bytes(text.encode(), place, place.parent, 0o644)
    session.store.close()
    _tell(draft, place, as_json=wishes.json)
    return check(open_session(session.project.root), [place.stem], as_json=wishes.json)


def _draft(session: Session, path: Path, wishes: argparse.Namespace) -> Draft:
    if wishes.family and wishes.family not in family_names():
        raise UsageError(f"there is no family {wishes.family!r}", hint=f"there are {', '.join(family_names())}")
    text = text_of(path)
    kind = next((kind for kind in KINDS if kind.recognises(path, text)), None)
    if kind is None:
        raise UsageError(
            f"{path} is nothing that forge can import",
            hint="a TOML file or command line of kohya's scripts, .mecha, YAML of mergekit, or lists of block weights",
        )
    draft = Draft(session.project.root, path.resolve().parent, session.project.sources | session.project.datasets)
    checkpoints = tuple(each.strip() for each in wishes.checkpoints.split(",") if each.strip())
    kind.read(path, text, draft, Wishes(wishes.family, checkpoints))
    draft.family = draft.family or _family_of_sources(session, draft)
    return draft


def _family_of_sources(session: Session, draft: Draft) -> str:
    """Return the family of the first source that is here, by its header; nothing where none is."""
    session.sources.quick = True
    for name, table in (draft.sources | session.project.sources).items():
        if name not in draft.sources and not _uses(draft, name):
            continue
        try:
            stated = Source.model_validate(table).model_dump(by_alias=True)
            return session.sources.artifact(Taken(name, "source", stated)).family
        except ForgeError:
            continue
    return ""


def _uses(draft: Draft, name: str) -> bool:
    return any(f'"{name}"' in json.dumps(table) for _, _, table in draft.targets)


def _name(session: Session, wish: str) -> str:
    """Return the recipe's name. Raises UsageError for what is none, or is there already."""
    if not is_name(wish):
        raise UsageError(f"{wish!r} is no name", hint=hint_at_name(wish))
    if session.project.recipe_path(wish).exists():
        raise UsageError(f"{RECIPES}/{wish}.toml is there already", hint="--name NAME gives the recipe another name")
    return wish


def _tell(draft: Draft, place: Path, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"v": 1, "event": "import", "recipe": place.stem, "notes": draft.notes}))
        return
    say(f"  {RECIPES}/{place.name} is written, from {draft.about}")
    if draft.notes:
        say("  not as it was there (the recipe says so too):")
    for note in draft.notes:
        say(f"  - {note}")
