"""Keeping house: `clean`, `schema`, `init`, completion."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from sdforge.artifact import UNPINNED
from sdforge.errors import BusyError, ForgeError, UsageError
from sdforge.graph import Taken
from sdforge.method import is_target, method, method_groups
from sdforge.names import NAME
from sdforge.nearby import welcome
from sdforge.places import FILE, RECIPES
from sdforge.repack import repack, saved, worn_packs
from sdforge.report.words import say, size
from sdforge.session import Session, open_session
from sdforge.store import Store
from sdforge.store.entries import Result, alias_in
from sdforge.store.files import publish_bytes, read_entry, resources

DERIVED_DAYS = 30  # after which latents and text encodings that nobody used go: they are made again where they lack


# -- clean -------------------------------------------------------------------------------------------------------------


def clean(session: Session, wishes: argparse.Namespace) -> None:
    """`forge clean`: remove what no recipe of any project reaches. Trained results and states only with --trained.

    Packs of which less than half is still needed are written anew with that.
    """
    store = session.store
    store.prepare()
    guard = store.guard()
    if not guard.acquire(wait=False):
        raise BusyError("a build or a download is using the cache", hint="clean when it is done")
    try:
        keep, fetched = _reached(session)
        staying, doomed = _divided(store, keep, trained=wishes.trained)
        doomed += _unfetched(store, fetched)
        packs = worn_packs(store, staying)
        freed = sum(_size(path) for path in doomed)
        if not wishes.dry_run:
            for path in doomed:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            packs = repack(store, staying, packs)
            store.forget(keep)
        freed += saved(store, staying, packs)  # from tables that the store has read before
    finally:
        guard.release()
    if wishes.json:
        said = {"files": len(doomed), "packs": len(packs), "bytes": freed, "dry_run": wishes.dry_run}
        print(json.dumps({"v": 1, "event": "clean", **said}))
        return
    verb = "would be freed" if wishes.dry_run else "freed"
    anew = f"; {len(packs)} packs shrink to what of them is needed" if packs else ""
    say(f"  {len(doomed)} files, {size(freed)} ({freed} bytes) {verb}{anew}")


def _reached(session: Session) -> tuple[set[str], set[Path]]:
    """The keys that any recipe of any project that uses this cache reaches, and the folders of fetched sources.

    Raises UsageError for recipes that cannot be planned.
    """
    store = session.store
    keys: set[str] = set()
    fetched: set[Path] = set()
    for root in {session.project.root, *store.roots()}:
        try:
            other = session if root == session.project.root else open_session(root, cache=store.root.parent)
            names = other.project.preset_names()
            other.open_recipes(names)
            plan = other.plan(list(other.graph.nodes))
        except ForgeError as error:
            here = root == session.project.root
            raise UsageError(
                f"the recipes of {root} cannot be planned, so what they need is not known: {error.message}",
                hint=f"mend them first{': `forge check` shows where' if here else ', or delete that project'}",
            ) from None
        for step in plan.steps.values():
            keys |= {step.key, step.content_key}
        keys |= set(other.lock.results)
        for past in map(other.chronicle.past, names):  # with what builds before drew reports and checks compare
            drawn = (*(build.pictures for build in past.builds), *past.passed)
            keys |= {pictures.key for pictures in drawn if pictures}
        declared = [Taken(name, "source", table) for name, table in other.project.sources.items()]
        sources = [*declared, *other.graph.sources.values()]
        fetched |= {path for taken in sources if (path := other.sources.fetched_folder(taken))}
    return keys - {""}, fetched


def _unfetched(store: Store, used: set[Path]) -> list[Path]:
    """What was fetched for sources that no project has any more, and downloads that nobody goes on with."""
    old = time.time() - DERIVED_DAYS * 86_400
    folders = [p for p in sorted((store.root / "fetched").glob("*")) if p.name != "parts" and p not in used]
    return folders + sorted(p for p in (store.root / "fetched" / "parts").glob("*") if p.stat().st_mtime < old)


def _divided(store: Store, keep: set[str], *, trained: bool) -> tuple[list[Result], list[Path]]:
    """Return the results that stay, and the files that may go: other results with what only they use, and leftovers."""
    staying: list[Result] = []
    doomed: list[Path] = []
    objects: set[str] = set()
    for path, result in store.results():
        pinned_kind = result.grade != "A" and result.kind not in UNPINNED
        if result.key in keep or (pinned_kind and not trained):
            staying.append(result)
            objects |= result.objects()
        else:
            doomed.append(path)
    objects |= store.source_tables()
    doomed += [p for p in sorted((store.root / "objects").glob("*/*")) if p.name not in objects]
    doomed += [p for p in sorted((store.root / "aliases").glob("*/*")) if _leads_nowhere(p, keep)]
    old = time.time() - DERIVED_DAYS * 86_400
    doomed += sorted(p for p in store.derived().glob("*/*.safetensors") if p.stat().st_mtime < old)
    if trained:
        doomed += sorted((store.root / "states").glob("*/*"))
    doomed += sorted((store.root / "quarantine").glob("*"))
    return staying, doomed


def _leads_nowhere(path: Path, keep: set[str]) -> bool:
    try:
        return path.name not in keep and alias_in(path.name, read_entry(path)) not in keep
    except (OSError, ValueError):  # a damaged one leads nowhere
        return True


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size if path.exists() else 0


# -- schema ------------------------------------------------------------------------------------------------------------


def schemas() -> dict[str, str]:
    """Return the JSON Schemas of recipes and of forge.toml: file name → text."""
    from sdforge.families import family_names
    from sdforge.tables import Dataset, ForgeLocalToml, ForgeToml, Preset, Source

    definitions: dict[str, Any] = {}
    properties: dict[str, Any] = {
        "family": {
            "type": "string",
            "enum": list(family_names()),
            "description": "the architecture of its checkpoints",
        },
        "description": {"type": "string"},
        "seed": {"type": "integer", "minimum": 0, "description": "of everything random in this recipe"},
        "source": _tables(Source, definitions, "files and folders that nobody makes"),
        "dataset": _tables(Dataset, definitions, "folders of pictures"),
        "preset": _model(Preset, definitions),
    }
    of_preset = {"type": "object", "properties": properties["preset"]["properties"], "additionalProperties": False}
    settings = {"type": "object", "description": "what is set of this target"}
    properties["variant"] = _varying("settings that are set otherwise, in RECIPE@NAME", settings, {"preset": of_preset})
    properties["sweep"] = _varying("settings of which each value is tried, in RECIPE@NAME-1, …", settings, {})
    checks: dict[str, Any] = {}
    for name, group in method_groups().items():
        about = (method(name).module.__doc__ or "").strip().splitlines()[0]
        if is_target(name):
            properties[name] = _tables(method(name).table, definitions, about)
        elif group == "checks":
            checks[name] = _tables(method(name).table, definitions, about)
    properties["checks"] = {
        "type": "object",
        "description": "what the previews are expected to show, before the preset's files are written",
        "properties": checks,
        "additionalProperties": False,
    }
    recipe = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "sdforge recipe",
        "type": "object",
        "properties": properties,
        "required": ["family"],
        "additionalProperties": False,
        "$defs": definitions,
    }
    return {
        "recipe.schema.json": _text(recipe),
        "forge.schema.json": _text(_whole(ForgeToml, "sdforge project")),
        "forge.local.schema.json": _text(_whole(ForgeLocalToml, "sdforge on this machine")),
    }


def _tables(model: Any, definitions: dict[str, Any], about: str) -> dict[str, Any]:
    return {
        "type": "object",
        "description": about,
        "additionalProperties": _model(model, definitions),
        "propertyNames": {"pattern": NAME},
    }


def _varying(about: str, settings: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of variants or sweeps: any target's settings, of which only forge knows which ones it has."""
    one = {"type": "object", "minProperties": 1, "properties": known, "additionalProperties": settings}
    names = {"allOf": [{"pattern": NAME}, {"not": {"pattern": "-[0-9]+$"}}]}
    return {"type": "object", "description": about, "propertyNames": names, "additionalProperties": one}


def _model(model: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    found = model.model_json_schema(by_alias=True)
    definitions |= {name: _plain(value) for name, value in found.pop("$defs", {}).items()}
    result: dict[str, Any] = _plain(found)
    return result


def _whole(model: Any, title: str) -> dict[str, Any]:
    definitions: dict[str, Any] = {}
    found = _model(model, definitions)
    return {"$schema": "http://json-schema.org/draft-07/schema#"} | found | {"title": title, "$defs": definitions}


def _plain(value: Any) -> Any:
    """Leave out pydantic's titles and the defaults that only mean «not there»."""
    if isinstance(value, dict):
        return {
            k: _plain(v)
            for k, v in value.items()
            if not (k == "title" and isinstance(v, str)) and not (k == "default" and v is None)
        }
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _text(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_schemas(root: Path, *, check: bool) -> int:
    """`forge schema`: write `.forge/*.schema.json`; with `check` only say whether they are up to date."""
    stale = []
    for name, text in schemas().items():
        path = root / ".forge" / name
        if not path.is_file() or path.read_bytes() != text.encode():
            stale.append(f".forge/{name}")
            if not check:
                path.parent.mkdir(exist_ok=True)
                publish_bytes(text.encode(), path, path.parent, 0o644)
    if check and stale:
        say(f"out of date: {', '.join(stale)}")
        return 2
    say(f"written: {', '.join(stale)}" if stale else "the schemas are up to date")
    return 0


# -- init --------------------------------------------------------------------------------------------------------------

IGNORED = "/cache/*\n!/cache/.gitignore\n/out/\n/.forge/log/\nforge.local.toml\n"


def demo() -> Path:
    """Return where the demo lies: in the installed package, or in the repository that this code runs from."""
    installed = Path(__file__).parent / "demo"
    return installed if (installed / FILE).is_file() else Path(__file__).parents[1]


def init(folder: Path) -> None:
    """`forge init`: a new project with the demo's recipes, bases and pictures. Nothing is overwritten.

    Raises UsageError where something is in its way, ResourceError where it cannot be written: then nothing of it stays.
    """
    if (folder / FILE).exists():
        raise UsageError(f"{folder} is a project already", hint="`forge build` builds it")
    for name in (RECIPES, ".gitignore"):
        if os.path.lexists(folder / name):
            raise UsageError(f"{folder / name} is there already", hint="name another folder: forge init DIR")
    new = [path for name in (RECIPES, "cache", ".gitignore", ".forge", FILE) if not (path := folder / name).exists()]
    try:
        with resources(f"no project can be made in {folder}"):
            _write_project(folder)
    except BaseException:
        for path in new:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        raise
    where = "" if folder.resolve() == Path.cwd() else f"cd {os.path.relpath(folder)} && "
    count = len(list((folder / RECIPES).glob("*.toml")))
    say(f"a project is in {folder}, with two small trained bases and {count} recipes (`forge list` names them)")
    welcome(folder)
    say(f"  next: {where}forge build anime-preset")
    say("  then: look at out/anime-preset/previews/sheet.png, change a number in recipes/anime-preset.toml, and")
    say("        `forge plan` says what that costs; `forge doctor` says whether this machine is fit, and sees its GPU")


def _write_project(folder: Path) -> None:
    """Write what a new project has; `forge.toml`, which makes it one, last."""
    origin = demo()
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(origin / RECIPES, folder / RECIPES, copy_function=_copy)
    (folder / "cache").mkdir(exist_ok=True)
    if not os.path.lexists(folder / "cache" / ".gitignore"):
        (folder / "cache" / ".gitignore").write_text("*\n!.gitignore\n")
    (folder / ".gitignore").write_text(IGNORED)
    for name, text in schemas().items():
        (folder / ".forge").mkdir(exist_ok=True)
        (folder / ".forge" / name).write_text(text, encoding="utf-8")
    _copy(origin / FILE, folder / FILE)


def _copy(origin: Path | str, place: Path | str) -> None:
    """Copy a file. Raises ResourceError, which ends a `copytree` at once: it gathers what the system itself says."""
    with resources(f"{place} cannot be written"):
        shutil.copyfile(origin, place)


# -- completion --------------------------------------------------------------------------------------------------------

BASH = """_forge() {
  local word="${COMP_WORDS[COMP_CWORD]}" command="" at="." i
  # bash takes RECIPE@VARIANT and RECIPE:NAME for several words: `name` is all of it, `before` what bash leaves alone;
  # behind a colon it shows the colon as the word, and completes an empty one
  local name="${COMP_LINE:0:COMP_POINT}" before
  name="${name##* }"
  [[ "$word" == ":" ]] && word=""
  before="${name%%"$word"}"
  for ((i = 1; i < COMP_CWORD; i++)); do
    case "${COMP_WORDS[i]}" in
      -C) at="${COMP_WORDS[i + 1]}"; i=$((i + 1)) ;;
      -*) ;;
      *) command="${COMP_WORDS[i]}"; break ;;
    esac
  done
  local options=""
  case "$command" in
    "") COMPREPLY=($(compgen -W "%(commands)s -C --version --help" -- "$word")); return ;;
%(cases)s
  esac
  if [[ "$word" == -* ]]; then
    COMPREPLY=($(compgen -W "$options" -- "$word"))
  else
    COMPREPLY=($(compgen -W "$(forge -C "$at" list --names 2>/dev/null)" -- "$name"))
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
  fi
}
complete -o default -F _forge forge
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n" + BASH
FISH = """complete -c forge -f
complete -c forge -n __fish_use_subcommand -a "%(commands)s"
complete -c forge -n "not __fish_use_subcommand" -a "(forge list --names 2>/dev/null)"
%(cases)s
"""


def completion(shell: str, options: dict[str, list[str]]) -> None:
    """`forge completion`: print a script that completes commands, their options, recipes and targets."""
    if shell == "fish":
        rows = [
            f"complete -c forge -n '__fish_seen_subcommand_from {name}' -l {option[2:]}"
            for name, found in options.items()
            for option in found
        ]
    else:
        rows = [f'    {name}) options="{" ".join(found)}" ;;' for name, found in options.items()]
    text = {"bash": BASH, "zsh": ZSH, "fish": FISH}[shell]
    print(text % {"commands": " ".join(options), "cases": "\n".join(rows)}, end="")
