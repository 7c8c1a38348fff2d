"""A lone preset file → the recipe that makes it again: the manifests in its header, and sources that are at hand.

The manifests hold methods, resolved settings and how everything hangs together, but no names; sources are named by
what they are. So files are looked for by content: among the project's sources and data sets, and in the folders of
`forge.local.toml`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sdforge import toml
from sdforge.artifact import SIDECARS, Artifact, artifact_identity
from sdforge.errors import ForgeError, UsageError
from sdforge.families import family, family_names
from sdforge.formats.own import MANIFEST
from sdforge.formats.pickled import is_pickle
from sdforge.formats.safetensors import read_header
from sdforge.graph import Taken
from sdforge.method import Role, Signature, method, method_groups
from sdforge.places import RECIPES
from sdforge.report.words import say
from sdforge.session import Session
from sdforge.store.files import publish_bytes, sha256_of

VERSION = 1  # of the manifests in files
PREDICTIONS = ("epsilon", "v_prediction")  # what a source may state of itself
STATED = {"title": "title", "description": "description", "licence": "license"}  # of a preset → of modelspec


class Found(NamedTuple):
    """A source that is at hand: its name in forge.toml, or the table that declares it in the new recipe."""

    artifact: Artifact
    kind: str
    name: str
    table: dict[str, Any]


def recipe_text(session: Session, path: Path) -> str:
    """Return a recipe by which a preset's file is made again.

    Raises UsageError for a file without manifests, and for sources that are not at hand, naming all of them.
    """
    if path.is_file() and is_pickle(path):
        raise UsageError(
            f"{path} is a pickle, which carries no recipe", hint="presets that forge has exported do: safetensors files"
        )
    metadata = read_header(path).metadata
    try:
        return _text(session, path, metadata)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, RecursionError):
        raise UsageError(
            f"{path} holds no manifests of forge that can be read", hint="presets that forge has exported do"
        ) from None


def _text(session: Session, path: Path, metadata: dict[str, str]) -> str:
    """Return the recipe. Raises whatever comes of manifests that forge did not write."""
    actions = _actions(path, metadata)
    wanted = {entry["source"]: entry["kind"] for entry in actions if "source" in entry}
    found = _at_hand(session, set(wanted))
    if missing := [f"{kind} {identity}" for identity, kind in wanted.items() if identity not in found]:
        raise UsageError(
            f"{path} is made from {len(missing)} sources that are not at hand:\n  " + "\n  ".join(missing),
            hint="these are their identities: declare them in forge.toml, or name their folder in forge.local.toml",
        )
    return _Writing(session, actions, found, metadata).text(path)


def show_recipe(session: Session, path: Path, *, as_json: bool) -> None:
    """`forge show --recipe FILE`: print the recipe by which a preset's file is made again."""
    text = recipe_text(session, path)
    print(json.dumps({"v": 1, "event": "recipe", "text": text}) if as_json else text, end="\n" if as_json else "")


def write_recipe(session: Session, path: Path) -> str:
    """Write the recipe of a preset's file into the project, under its name or the next free one; return the name.

    Raises UsageError for a file that no recipe can make, and where no name is free.
    """
    text = recipe_text(session, path).encode()
    stem = re.sub(r"[^a-z0-9_-]", "-", path.stem.lower())
    stem = (stem if stem[:1].isalpha() else f"preset-{stem}")[:50]
    for name in (stem, f"{stem}-again", *(f"{stem}-again-{i}" for i in range(2, 1000))):
        place = session.project.root / RECIPES / f"{name}.toml"
        if not place.exists():
            publish_bytes(text, place, place.parent, 0o644)
        if place.read_bytes() == text:
            return name
    raise UsageError(f"{RECIPES}/ holds a thousand recipes called {stem}", hint="remove some")


def tell(session: Session, name: str, path: Path, *, as_json: bool) -> None:
    """Say whether a recipe has made, byte for byte, the file that it was written for."""
    made = session.project.out / name / f"{name}.safetensors"
    same = sha256_of(made) == sha256_of(path)
    if as_json:
        print(json.dumps({"v": 1, "event": "rebuilt", "recipe": name, "equal": same}))
        return
    words = "is that file, byte for byte" if same else "is not that file: something was trained anew, or made elsewhere"
    say(f"  {made.relative_to(session.project.root)} {words}")


def _actions(path: Path, metadata: dict[str, str]) -> list[dict[str, Any]]:
    value = json.loads(metadata[MANIFEST])
    actions: list[dict[str, Any]] = value["actions"]
    numbers = [n for i, e in enumerate(actions) for found in e.get("inputs", {}).values() for n in found if n >= i]
    families = {entry["manifest"]["family"] for entry in actions if "manifest" in entry}
    if value["v"] != VERSION or numbers or not families <= set(family_names()):
        raise ValueError("it was not written by this forge")
    unknown = sorted({_name(e) for e in actions if "source" not in e and _name(e) not in method_groups()})
    if unknown:
        raise UsageError(f"{path} was made by methods that are not here: {', '.join(unknown)}", hint="update sdforge")
    return actions


def _name(entry: dict[str, Any]) -> str:
    return str(entry.get("method") or entry["manifest"]["method"])


# -- sources -----------------------------------------------------------------------------------------------------------


def _at_hand(session: Session, wanted: set[str]) -> dict[str, Found]:
    """Return identity → source, for as many as can be found; files are read in full when they are first seen."""
    found: dict[str, Found] = {}
    for taken, name in _declared(session):
        if wanted <= found.keys():
            return found
        _look(session, taken, name, found)
    for table in _loose(session):
        if wanted <= found.keys():
            return found
        if _look(session, Taken(f"loose/{table['from']}", "source", table), "", found) == "checkpoint":
            for prediction in PREDICTIONS:  # what a source states of itself is part of what it is
                stated = table | {"prediction": prediction}
                _look(session, Taken(f"loose/{prediction}/{table['from']}", "source", stated), "", found)
    return found


def _look(session: Session, taken: Taken, name: str, found: dict[str, Found]) -> str:
    """Note what a source is; return its kind, or "" for what cannot be used and so never was."""
    try:
        artifact = session.sources.artifact(taken)
    except ForgeError:
        return ""
    found.setdefault(artifact.identity, Found(artifact, taken.kind, name, taken.table))
    return artifact.kind


def _declared(session: Session) -> Iterator[tuple[Taken, str]]:
    """Yield what forge.toml declares, with its name, and what recipes declare for themselves."""
    project = session.project
    for kind, tables in (("source", project.sources), ("dataset", project.datasets)):
        yield from ((Taken(name, kind, table), name) for name, table in tables.items())
    for recipe in project.recipe_names():
        try:
            own = project.recipe(recipe)
        except ForgeError:
            continue
        for kind, tables in (("source", own.sources), ("dataset", own.datasets)):
            yield from ((Taken(f"{recipe}/{name}", kind, table), "") for name, table in tables.items())


def _loose(session: Session) -> Iterator[dict[str, Any]]:
    """Yield tables for all files, checkpoint folders and folders of a network alone in the folders of this machine."""
    for folder in session.project.folders:
        for path in sorted(folder.rglob("*.safetensors")):
            yield {"from": str(path.relative_to(folder))}
        for path in sorted(folder.rglob("model_index.json")):
            yield {"from": str(path.parent.relative_to(folder))}
        for path in sorted(folder.rglob("config.json")):
            if not (path.parent.parent / "model_index.json").is_file():  # else it is a part of a whole checkpoint
                yield {"from": str(path.parent.relative_to(folder))}


# -- the recipe --------------------------------------------------------------------------------------------------------


class _Writing:
    """One recipe: a table for every source that forge.toml does not name, one for every action, and the preset."""

    def __init__(
        self, session: Session, actions: list[dict[str, Any]], found: dict[str, Found], metadata: dict[str, str]
    ) -> None:
        self.session, self.actions, self.found, self.metadata = session, actions, found, metadata
        self.names: list[str] = []
        self.tables: list[str] = []
        self.notes: list[str] = []

    def text(self, path: Path) -> str:
        for i, entry in enumerate(self.actions):
            if "source" in entry:
                self._source(i, self.found[entry["source"]])
            else:
                self._action(i, entry)
        made = [entry["manifest"]["family"] for entry in self.actions if "manifest" in entry]
        taken = [source.artifact.family for source in self.found.values() if source.artifact.kind == "checkpoint"]
        told = [name for name in (*made, *taken) if name]  # a VAE or text encoder alone is of no family
        head = [f"# written from the manifests in {json.dumps(path.name)}", *self.notes]
        return "\n".join([*head, f"family = {toml.value(told[-1])}", "", *self.tables, self._preset()])

    def _source(self, i: int, source: Found) -> None:
        name = source.name or self._free(f"{source.kind}-{i}")
        self.names.append(name)
        if not source.name:
            files = source.artifact.notes.get("files", {})
            sha256 = {"sha256": next(iter(files.values()))} if len(files) == 1 else {}
            self.tables.append(toml.table((source.kind, name), _stated(source.table | sha256)))

    def _action(self, i: int, entry: dict[str, Any]) -> None:
        name = _name(entry)
        signature, manifest = method(name).signature, entry.get("manifest", {})
        self.names.append(self._free(f"{name}-{i}"))
        values = _stated(manifest.get("settings", {}))
        values |= {"seed": manifest["seed"]} if "seed" in manifest else {}
        for role, numbers in entry["inputs"].items():
            values[role] = self._role(role, signature.roles[role], numbers, manifest)
        self.tables.append(toml.table((name, self.names[i]), values))
        if manifest:
            self._note_version(self.names[i], signature, manifest)

    def _role(self, role: str, spec: Role, numbers: list[int], manifest: dict[str, Any]) -> Any:
        """Return what stands in a table under a role: a name, a list of names, or name → how it is used."""
        if not spec.many:
            return self.names[numbers[0]]
        if spec.many == "list":
            return [self.names[number] for number in numbers]
        given: list[dict[str, Any]] = list(manifest["inputs"][role])
        uses: dict[str, Any] = {}
        for number in numbers:
            if own := next((each for each in given if self._is(number, spec, each["artifact"])), None):
                given.remove(own)
                uses[self.names[number]] = _stated(own["use"])
        left = [self.names[number] for number in numbers if self.names[number] not in uses]
        if any(each["use"] != given[0]["use"] for each in given):
            raise UsageError(f"which of {', '.join(left)} is used how cannot be told from the manifests")
        return uses | {name: _stated(each["use"]) for name, each in zip(left, given, strict=True)}

    def _is(self, number: int, spec: Role, named: Any) -> bool:
        """Say whether an input as a manifest names it is what an entry made, as far as the entry says what that is."""
        entry = self.actions[number]
        digest = entry.get("source") or entry.get("digest")
        if isinstance(named, str):
            return bool(named == digest)
        facts = named.get("facts", {})
        return digest in [artifact_identity(kind, named["components"], facts) for kind in spec.kinds]

    def _note_version(self, name: str, signature: Signature, manifest: dict[str, Any]) -> None:
        now = {"version": signature.version, **signature.code, "family": family(manifest["family"]).version}
        then = {"version": manifest["version"], **manifest["code"]}
        differing = [what for what in now if then.get(what) != now[what]]
        if other := [f"{what} {json.dumps(then.get(what))}, here {now[what]}" for what in differing]:
            self.notes.append(f"# {name} was made with {'; '.join(other)}: it may come out differently")

    def _free(self, name: str) -> str:
        """Return a name that forge.toml does not give to something else."""
        taken = self.session.project.sources.keys() | self.session.project.datasets.keys()
        return self._free(f"{name}x") if name in taken else name

    def _preset(self) -> str:
        used = {n for entry in self.actions for numbers in entry.get("inputs", {}).values() for n in numbers}
        ends = [i for i in range(len(self.actions)) if i not in used]
        checkpoints = [i for i in range(len(self.actions)) if self._makes(i) == "checkpoint"]
        # a checkpoint on which only sidecars were made is the last one there is
        checkpoint = next((i for i in ends if i in checkpoints), checkpoints[-1])
        stated: dict[str, Any] = {
            name: self.metadata[f"modelspec.{theirs}"]
            for name, theirs in STATED.items()
            if f"modelspec.{theirs}" in self.metadata
        }
        if trigger := self.metadata.get("modelspec.trigger_phrase"):
            stated["trigger"] = trigger.split(", ")
        if layer := self.metadata.get("modelspec.encoder_layer"):
            stated["clip_skip"] = int(layer) - 1
        sidecars = [self.names[i] for i in ends if self._makes(i) in SIDECARS]
        stated |= {"sidecars": sidecars} if sidecars else {}
        return toml.table(("preset",), {"checkpoint": self.names[checkpoint], "export": ["checkpoint"], **stated})

    def _makes(self, i: int) -> str:
        entry = self.actions[i]
        return str(entry["kind"]) if "source" in entry else method(_name(entry)).signature.makes


def _stated(value: Any) -> Any:
    """Return a value without what is None, since TOML has no such thing."""
    if isinstance(value, dict):
        return {name: _stated(each) for name, each in value.items() if each is not None}
    return [_stated(each) for each in value] if isinstance(value, list) else value
