"""`forge fetch`, `forge add`, and what `forge lock` asks of hosts: sources from elsewhere, pinned and brought here."""

from __future__ import annotations

import argparse
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdforge import toml
from sdforge.datasets import folders
from sdforge.errors import ForgeError, RecipeError, UsageError, counted, exit_code, nearest
from sdforge.exchange import look_for_pinned
from sdforge.fetch import Fetcher, Got
from sdforge.fetch.hosts import Behind
from sdforge.graph import Taken
from sdforge.lock import Lock
from sdforge.lockfile import LockFile
from sdforge.names import hint_at_name, is_name
from sdforge.pictures import PICTURES
from sdforge.places import FILE
from sdforge.references import is_remote, parse
from sdforge.report.hashing import Fetching
from sdforge.report.words import glyphs, say, size
from sdforge.session import Session, open_session
from sdforge.store.files import publish_bytes, within
from sdforge.syntax import read_toml
from sdforge.tables import Dataset, Source


def remote_sources(session: Session, names: list[str]) -> list[Taken]:
    """Return the sources from elsewhere of the project and its recipes, or those that are named.

    names: of sources, or of recipes (all that they take). Raises UsageError with a guess at what was meant.
    """
    found = {name: Taken(name, "source", table) for name, table in session.project.sources.items()}
    taken_by: dict[str, list[str]] = {}
    for recipe in session.project.recipe_names():
        try:
            session.open_recipes([recipe])
        except RecipeError:
            if recipe in names:
                raise
            continue  # `forge check` says what is wrong there
        taken_by[recipe] = [name for name, taken in session.graph.sources.items() if taken.kind == "source"]
        found |= {name: session.graph.sources[name] for name in taken_by[recipe]}
    wanted = list(names) or list(found)
    chosen: dict[str, Taken] = {}
    for name in wanted:
        if name not in found and name not in taken_by:
            guess = nearest(name, [*found, *taken_by])
            raise UsageError(
                f"there is no source and no recipe {name!r}",
                hint=f"did you mean {guess!r}?" if guess else f"there are: {', '.join(found) or 'none'}",
            )
        for each in taken_by[name] if name in taken_by and name not in found else [name]:
            if is_remote(found[each].table["from"]):
                chosen[each] = found[each]
            elif each in names:
                raise UsageError(f"{each} is a file of this machine: {found[each].table['from']}")
    return list(chosen.values())


@contextmanager
def fetcher(session: Session, *, as_json: bool, offline: bool = False) -> Iterator[Fetcher]:
    """Yield what gets sources; they are pinned before it ends, so that `clean` never finds one that nobody names."""
    with session.store.used_by(session.project.root):
        yield Fetcher(session.store, session.project.folders, (lambda *_: None) if as_json else Fetching(), offline)


def fetch(session: Session, wishes: argparse.Namespace) -> int:
    """`forge fetch`: bring sources here, and pinned results; what one cannot have does not stop the others.

    Offline what this machine has is linked, and the lock stays as it is. Returns the exit code.
    """
    sources = remote_sources(session, wishes.sources)
    errors = []
    with fetcher(session, as_json=wishes.json, offline=wishes.offline) as getter:
        for taken in sources:
            try:
                behind = getter.resolve(taken, session.lock.sources.get(taken.id, {}))
                got = getter.get(taken, behind)
                if not wishes.offline:
                    pin(session, taken, got.row)
                _tell(taken, got, as_json=wishes.json)
            except ForgeError as error:
                errors.append(error)
                _tell_error(taken.id, error, as_json=wishes.json)
    recipes = [name for name in wishes.sources if name in session.project.recipe_names()]
    looked = False
    try:
        looked = bool(recipes or not wishes.sources) and look_for_pinned(session, wishes, recipes)
    except ForgeError as error:
        errors.append(error)
        _tell_error("[remote]", error, as_json=wishes.json)
    if not (sources or looked or errors or wishes.json):
        say("  nothing to fetch: no source comes from elsewhere, and no pinned result is missing")
    return exit_code(errors)


def pin(session: Session, taken: Taken, row: dict[str, Any], *, anew: bool = False) -> None:
    """Write into the lock where a source was found; unless `anew` what a build has read from that place stays."""

    def enter(lock: Lock) -> None:
        old = lock.sources.get(taken.id, {})
        if anew or "digest" not in old or any(old.get(name) != row[name] for name in ("from", "resolved")):
            lock.sources[taken.id] = row

    LockFile(session).rewrite(enter)


def _tell(taken: Taken, got: Got, *, as_json: bool) -> None:
    if as_json:
        about = {"source": taken.id, "state": got.how, "bytes": got.size, "resolved": got.row["resolved"]}
        print(json.dumps({"v": 1, "event": "fetch", **about}))
        return
    behind = {"fetched": got.row["resolved"], "linked": f"it lay at {os.path.realpath(got.path)}", "here": "was here"}
    say(f"  {glyphs(sys.stdout)['reuse']} {taken.id:<18} {got.how:<8} {size(got.size):>9}  {behind[got.how]}")


def _tell_error(name: str, error: ForgeError, *, as_json: bool) -> None:
    if as_json:
        about = {"source": name, "code": error.exit_code, "message": error.message, "hint": error.hint}
        print(json.dumps({"v": 1, "event": "error", **about}))
        return
    say(f"  {glyphs(sys.stdout)['failed']} {name:<18} {error.message}")
    if error.hint:
        say(f"      try   {error.hint}")


# -- lock --------------------------------------------------------------------------------------------------------------


def resolve_all(session: Session, sources: list[Taken], *, update: bool, as_json: bool) -> list[str]:
    """Pin what sources from elsewhere stand for; with `update` anew. Returns those that changed or are new.

    Of a plain address only its bytes tell whether they are others, so `update` gets them.
    """
    changed = []
    with fetcher(session, as_json=as_json) as getter:
        for taken in sources:
            row = session.lock.sources.get(taken.id, {})
            if not update and row.get("from") == taken.table["from"] and row.get("resolved"):
                continue
            behind = getter.resolve(taken, row, update=update)
            told = behind.whole or behind.files[0].sha256
            found = getter.row(taken, behind) if told or not update else getter.get(taken, behind).row
            if row.get("resolved") != found["resolved"] or any(
                row.get("files", {}).get(name) != sha256 for name, sha256 in found["files"].items()
            ):
                pin(session, taken, found, anew=update)
                changed.append(taken.id)
    return changed


# -- add ---------------------------------------------------------------------------------------------------------------


def add(wishes: argparse.Namespace) -> int:
    """`forge add NAME REF`: write a source, or a folder of pictures as a data set, into forge.toml; say what it is."""
    session = open_session(Path(wishes.at))
    _refuse_name(session, wishes.name)
    if not is_remote(wishes.reference):
        wishes.reference = _as_stated(session, wishes.reference)
    name, reference = wishes.name, wishes.reference
    if layout := "" if is_remote(reference) else _layout_of_pictures(session.project.root / reference):
        return _add_pictures(session, wishes, layout)
    if is_remote(reference):
        parse(reference)  # before it stands in forge.toml
    if wishes.sha256 and not re.fullmatch("[0-9a-f]{64}", wishes.sha256):
        raise UsageError(f"{wishes.sha256!r} is no sha256", hint="64 of 0-9 and a-f")
    table: dict[str, Any] = {"from": reference, "sha256": wishes.sha256, "licence": wishes.licence}
    behind, where = None, ""
    if is_remote(reference) and not wishes.offline:
        with fetcher(session, as_json=True) as getter:
            behind = getter.resolve(_taken(name, table), {})
        table = _stated(table, behind)
    elif not is_remote(reference):
        where = _found(session, name, table)
    _append(session, f"source.{name}", table)
    session = open_session(Path(wishes.at))
    if behind is not None:
        taken = Taken(name, "source", session.project.sources[name])
        with fetcher(session, as_json=True) as getter:
            pin(session, taken, getter.row(taken, behind))
            if got := getter.link(taken, behind):
                pin(session, taken, got.row)
                where = os.path.realpath(got.path)
    _tell_added(session, name, behind, where, as_json=wishes.json)
    return 0


def _refuse_name(session: Session, name: str) -> None:
    if not is_name(name):
        raise UsageError(f"{name!r} is no name", hint=hint_at_name(name))
    if name in session.project.sources or name in session.project.datasets:
        raise UsageError(f"forge.toml has a {name!r} already", hint="choose another name, or change it there")


def _as_stated(session: Session, written: str) -> str:
    """Return a path that a shell has completed as a source states it: from the project, or a folder of this machine.

    Raises UsageError for what is there and in none of them.
    """
    path, project = Path(os.path.abspath(os.path.expanduser(written))), session.project  # noqa: PTH100, PTH111
    if not os.path.lexists(path):
        return written  # from the project or a folder already, or nowhere
    for folder in (project.root, *project.folders):
        for place in (Path(os.path.normpath(folder)), folder.resolve()):
            if path != place and path.is_relative_to(place):
                return path.relative_to(place).as_posix()
    if (project.root / written).exists() and not {"..", os.sep} & {*Path(written).parts}:
        return written
    hint = f"forge.local.toml can name its folder: folders = [{toml.value(str(path.parent))}]"
    if _layout_of_pictures(path):
        hint = "pictures lie in the project: copy or move the folder there"
    raise UsageError(f"{written} lies outside of the project", hint)


def _taken(name: str, table: dict[str, Any]) -> Taken:
    stated = {key: value for key, value in table.items() if value}
    return Taken(name, "source", Source.model_validate(stated).model_dump(by_alias=True))


def _stated(table: dict[str, Any], behind: Behind) -> dict[str, Any]:
    """Add what the host says of a source: the sha256 of a single file, licence and trigger words."""
    sha256 = "" if behind.whole else behind.files[0].sha256
    about = {key: value for key, value in behind.about.items() if not table.get(key)}
    return table | about | {"sha256": table["sha256"] or sha256}


def _found(session: Session, name: str, table: dict[str, Any]) -> str:
    """Return where a file or folder of this machine lies. Raises UsageError if it is nowhere."""
    session.sources.quick = True
    taken = _taken(name, table)
    session.sources.artifact(taken)
    path = within(session.project.root, table["from"])
    return str(path if path.exists() else table["from"])


def _layout_of_pictures(path: Path) -> str:
    """Return how a folder of pictures is laid out, `flat` or `kohya`; "" for what is none."""
    for layout in ("flat", "kohya") if path.is_dir() else ():
        if any(p.suffix.lower() in PICTURES for folder, _, _ in folders(layout, path, 1) for p in folder.iterdir()):
            return layout
    return ""


def _add_pictures(session: Session, wishes: argparse.Namespace, layout: str) -> int:
    """Write a data set into forge.toml. Raises UsageError for pictures that cannot be learned from."""
    if wishes.sha256:
        raise UsageError(f"{wishes.reference} is a folder of pictures", hint="--sha256 is of a single file")
    table = {"path": wishes.reference, "layout": "" if layout == "flat" else layout, "licence": wishes.licence}
    stated = Dataset.model_validate({key: value for key, value in table.items() if value})
    notes = session.sources.artifact(Taken(wishes.name, "dataset", stated.model_dump())).notes
    _append(session, f"dataset.{wishes.name}", table)
    pictures, without = len(notes["names"]), notes["without"]
    if wishes.json:
        about = {"dataset": wishes.name, "pictures": pictures, "without": without}
        print(json.dumps({"v": 1, "event": "add", **about}))
        return 0
    say(f"  + {FILE}: [dataset.{wishes.name}]")
    say(f"    {counted(pictures, 'picture')}{f', {len(without)} of them without a caption' if without else ''}")
    return 0


def _append(session: Session, header: str, table: dict[str, Any]) -> None:
    """Add a table at the end of forge.toml, without its empty values; what stands there stays, comments and all.

    Behind a link the file that it leads to is written. Raises UsageError where no table can stand behind what is there.
    """
    path = (session.project.root / FILE).resolve()
    lines = [f"[{header}]", *(f"{key} = {toml.value(value)}" for key, value in table.items() if value)]
    with LockFile(session).guard() as guard:
        guard.acquire(wait=True)
        before = path.read_bytes()
        gap = b"" if not before else b"\n" if before.endswith(b"\n") else b"\n\n"
        after = before + gap + "\n".join(lines).encode() + b"\n"
        try:
            read_toml(after, FILE)
        except RecipeError:
            raise UsageError(
                f"{FILE} does not go on with [{header}]: what stands there is left as it is",
                hint="write `[source.NAME]` and `[dataset.NAME]` as tables of their own, and add it then",
            ) from None
        publish_bytes(after, path, path.parent, stat.S_IMODE(path.stat().st_mode))


def _tell_added(session: Session, name: str, behind: Behind | None, where: str, *, as_json: bool) -> None:
    about = session.project.sources[name]
    if as_json:
        resolved = behind.pinned if behind else ""
        print(json.dumps({"v": 1, "event": "add", "source": name, "resolved": resolved, "here": bool(where)}))
        return
    for line in _lines(name, about, behind, where):
        say(f"  {line}")


def _lines(name: str, about: dict[str, Any], behind: Behind | None, where: str) -> Iterator[str]:
    yield f"+ {FILE}: [source.{name}]"
    if behind is not None:
        amount = sum(file.size or file.near for file in behind.files)
        files = f"{len(behind.files)} files" if behind.whole else behind.files[0].name
        yield f"  {files}{f', {size(amount)}' if amount else ''}: {behind.pinned}"
    if about.get("licence"):
        yield f"  licence: {about['licence']}"
    if about.get("trigger"):
        yield f"  trigger: {', '.join(about['trigger'])}"
    if where:
        yield f"  it is on this machine: {where}"
    else:
        yield f"  `forge fetch {name}` gets it"
