"""The store: key → results, digest → bytes. The only writer in the cache.

    cache/v1/
      objects/ab/SHA256          packs (safetensors), tables of tensors, vocabularies, pictures, logs: immutable
      results/ab/KEY/DIGEST.json what an action made, written last
      aliases/ab/KEY             another key under which the same result is found (same input bytes)
      preimages/ab/KEY           the manifest behind a key, for `why`
      states/ab/KEY/STEP.json    train states, as objects and their description
      derived/ab/NAME            latents and the like: rebuilt when missing
      fetched/NAME               sources from elsewhere, under their sha256 or their revision
      locks/KEY.lock             flock; never deleted
      roots/NAME                 projects that use this cache
      quarantine/  tmp/  index.db

The index only repeats what the folders hold. A result's tensors are listed in tables; a row says in which pack of the
store (its own, or that of an earlier result with the same tensor), or in which source file, a tensor's bytes lie.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sdforge.artifact import Component, Spot, Tensor
from sdforge.errors import BrokenPromise, LostObject
from sdforge.identity import digest_of_text
from sdforge.index import Index
from sdforge.places import FILE
from sdforge.store.entries import Known, Result, alias_in, alias_text, load_result, preimage_in, sum_of, table_bytes
from sdforge.store.files import (
    CACHE_TAG,
    Lock,
    damaged,
    is_abandoned,
    make_folder,
    own_name,
    publish,
    publish_bytes,
    read_entry,
    resources,
    sweep_parts,
)
from sdforge.store.seen import Seen

LAYOUT = "v1"
INDEX = "index.db"
FOLDERS = (
    *("objects", "results", "aliases", "preimages", "states", "derived"),
    *("fetched", "locks", "roots", "quarantine", "tmp"),
)
ALL_LISTED = "*"  # in the index of tensors: no result is missing from it
NO_KEY = "-"  # in the place of a key: nothing is ever kept under it
COMPLETE = ".complete"  # in a folder of what was fetched, when all of it is there
TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# This folder is a cache of sdforge.\n"


def called(project: Path) -> str:
    """Return what a cache calls a project's folder: 16 hexadecimal digits that do not tell where it is."""
    return hashlib.sha256(str(project).encode()).hexdigest()[:16]


class Store:
    """One cache folder."""

    def __init__(self, root: Path) -> None:
        self.root = root / LAYOUT
        self.index = Index(self.root / INDEX)
        self.seen = Seen(self.index)
        self._known: dict[str, Known] = {}
        self._tables: dict[str, list[Tensor]] = {}
        self._ready = False

    # -- folders ---------------------------------------------------------------------------------------------------

    def object(self, sha256: str) -> Path:
        return self.root / "objects" / sha256[:2] / sha256

    def keyed(self, kind: str, key: str) -> Path:
        """Return where what is kept under a key lies: `results`, `aliases`, `preimages` or `states`.

        Under no key nothing is kept: "" would name the folder of all, which a reader would set aside as damaged.
        """
        key = key or NO_KEY
        return self.root / kind / key[:2] / key

    def fetched(self, pinned: str, sha256: str = "") -> Path:
        """Return the folder of what was fetched: of a single file by its sha256, of many by their pinned revision."""
        return self.root / "fetched" / (sha256 or digest_of_text("fetched", pinned))

    @property
    def temporary(self) -> Path:
        return self.root / "tmp"

    def prepare(self) -> None:
        """Make the folders, and sweep what dead processes left behind. Raises ResourceError."""
        if self._ready:
            return
        with resources(f"the cache {self.root} cannot be used"):
            make_folder(self.temporary)
            tag = self.root.parent / CACHE_TAG
            if not tag.exists():
                tag.write_text(TAG)
        self.sweep()
        self._ready = True

    def workplace(self) -> Path:
        """Return a new folder in `tmp/`, whose name tells who is at work there."""
        self.prepare()
        folder = self.temporary / own_name()
        with resources("a workplace cannot be made"):
            folder.mkdir()
        return folder

    def sweep(self) -> None:
        """Remove workplaces and unfinished files whose makers are gone."""
        import shutil

        for path in self.temporary.iterdir():
            if path.is_dir() and is_abandoned(path):
                shutil.rmtree(path, ignore_errors=True)
        for folder in (self.temporary, self.derived()):
            sweep_parts(folder)

    def lock(self, key: str) -> Lock:
        """Return the lock of a key (not yet held)."""
        self.prepare()
        return Lock(self.root / "locks" / f"{key}.lock")

    def guard(self) -> Lock:
        """Return the lock that builds share and `clean` takes alone."""
        return Lock(self.root / "locks" / "store.lock")

    def source_tables(self) -> set[str]:
        """Return the objects that list or hold tensors of sources, for all sources that were ever looked at."""
        found = set()
        for _, _, _, text in self.index.read("seen", "id LIKE 'source:%'"):
            value = json.loads(text)
            found |= {row[2] for row in value.get("components", {}).values()} | set(value.get("objects", ()))
        return found

    def forget(self, keep: set[str]) -> None:
        """Drop from the index what was removed from the folders."""
        known = self.index.read("known")
        self.index.write("DELETE FROM known WHERE key = ?", [(key,) for key, _ in known if key not in keep])
        self.index.write("DELETE FROM tensors", [()])  # they are listed anew when they are next asked for
        self._known.clear()

    # -- bytes -----------------------------------------------------------------------------------------------------

    def put_bytes(self, data: bytes) -> str:
        """Keep bytes as an object; return their sha256."""
        sha256 = hashlib.sha256(data).hexdigest()
        if not self.object(sha256).exists():
            publish_bytes(data, self.object(sha256), self.temporary)
        return sha256

    def put_file(self, path: Path, sha256: str) -> None:
        """Keep a written file as an object."""
        if self.object(sha256).exists():
            path.unlink()
        else:
            publish(path, self.object(sha256))
            self.seen.note_written(self.object(sha256), sha256)

    def note_laid(self, sha256: str, key: str, data_sha256: str) -> None:
        """Note that a pack is laid out as a file (see `FileLayout.key`)."""
        self.note_run(f"laid:{sha256}", [key, data_sha256])

    def laid(self, packs: Iterable[str]) -> dict[str, tuple[str, str, str]]:
        """Return which of these packs are laid out as files, and hold the bytes that they held then.

        Layout → the pack's path, its sha256, and that of what follows its header.
        """
        found = {}
        for sha256 in packs:
            noted = self.run_noted(f"laid:{sha256}")
            path = self.object(sha256)
            if noted and path.is_file() and self.seen.digest(path) == sha256:
                found[noted[0]] = str(path), sha256, noted[1]
        return found

    def read_object(self, sha256: str) -> bytes:
        """Return an object's bytes, verified. Raises LostObject if it is missing or damaged."""
        path = self.object(sha256)
        try:
            data = read_entry(path)
            if hashlib.sha256(data).hexdigest() != sha256:
                raise ValueError("its bytes are not what its name says")
        except FileNotFoundError:
            raise LostObject(f"the store has no object {sha256[:12]}", sha256) from None
        except ValueError as error:
            raise LostObject(damaged(path, self.root / "quarantine", str(error)).message, sha256) from None
        return data

    def bytes_of(self, sha256: str) -> bytes:
        """Return an object's bytes; nothing where it is lost, for what can go on without it."""
        try:
            return self.read_object(sha256)
        except LostObject:
            return b""

    def put_table(self, tensors: Iterable[Tensor]) -> str:
        """Keep a table of tensors; return how `Component.table` names it."""
        return self.put_bytes(table_bytes(tensors))

    def table(self, component: Component) -> list[Tensor]:
        """Return the tensors of a component whose bytes have been seen."""
        if component.table not in self._tables:
            self._tables[component.table] = self._read_table(component.table)
        return self._tables[component.table]

    def _read_table(self, sha256: str) -> list[Tensor]:
        rows = json.loads(self.read_object(sha256))
        return [
            Tensor(name, dtype, tuple(shape), identity, own, xxh3, Spot(*spot) if spot else None)
            for name, dtype, shape, identity, own, xxh3, spot in rows
        ]

    def tensors(self, identities: Iterable[str]) -> dict[str, Tensor]:
        """Return, of tensors that formulas have made, those that a result lists: identity → where its bytes lie."""
        if not self.index.read_keyed("tensors", [ALL_LISTED]):
            for _, result in self.results():
                self.list_tensors(result)
            self.index.put("tensors", {ALL_LISTED: ""})
        listed = self.index.read_keyed("tensors", identities)
        found: dict[str, Tensor] = {}
        for table in sorted(set(listed.values())):
            with suppress(BrokenPromise):  # a table that is lost or damaged lists nothing
                rows = self.table(Component("", "", table, ""))
                found |= {row.identity: row for row in rows if listed.get(row.identity) == table}
        return found

    def list_tensors(self, result: Result) -> None:
        """Note in which tables the tensors of a result stand that were named by how they are made."""
        rows: dict[str, str] = {}
        for component in result.components.values():
            if component.identity != component.content and component.dtype:
                with suppress(BrokenPromise):
                    table = self._read_table(component.table)  # that nobody else may ask for
                    rows |= {t.identity: component.table for t in table if t.identity != t.content}
        self.index.put("tensors", rows)

    def vocabulary(self, component: Component) -> dict[str, Any]:
        """Return the words of a tokenizer component."""
        found: dict[str, Any] = json.loads(self.read_object(component.table))
        return found

    def find(self, sha256: str) -> Path | None:
        """Return a file with these bytes: an object, or a source that has not changed since it was looked at."""
        path = self.object(sha256)
        return path if path.exists() else self.seen.find(sha256)

    def holds(self, result: Result) -> bool:
        """Say whether all files in which a result's bytes lie are there, and the tables that list its tensors."""
        tables = (self.object(component.table).exists() for component in result.components.values())
        return all(self.find(pack) for pack in result.packs) and all(tables)

    # -- results ---------------------------------------------------------------------------------------------------

    def expect(self, recipes: list[str]) -> None:
        """Look up, in one go, all keys that these recipes had when they were last built."""
        rows = self.index.read_keyed("expected", recipes)
        keys = [key for text in rows.values() for key in text.split()]
        values = self.index.read_keyed("known", keys)
        self._known |= {key: Known.load(value) for key, value in values.items() if key not in self._known}

    def will_expect(self, recipe: str, keys: Iterable[str]) -> None:
        """Note the keys of a recipe for the next time."""
        text = " ".join(sorted(set(keys)))
        if self.index.read_keyed("expected", [recipe]).get(recipe) != text:
            self.index.put("expected", {recipe: text})

    def known(self, key: str) -> Known:
        """Return what the store knows under a key."""
        if key not in self._known:
            row = self.index.read_keyed("known", [key]).get(key)
            self._known[key] = Known.load(row) if row else self.fresh(key)
        return self._known[key]

    def fresh(self, key: str) -> Known:
        """Look into the folders themselves, past the index."""
        old = self._known.get(key)
        found = Known(formula=old.formula if old else None)
        alias = self.keyed("aliases", key)
        found.alias = self._read_alias(alias)
        folder = self.keyed("results", key)
        if folder.is_dir():
            found.results = sorted(
                (result for _, result in self._read_results(folder)), key=lambda result: (result.made, result.digest)
            )
        self._known[key] = found
        return found

    def _read_alias(self, path: Path) -> str:
        """Return where an alias leads, or "" where there is none; a damaged one is set aside."""
        try:
            return alias_in(path.name, read_entry(path))
        except FileNotFoundError:
            return ""
        except ValueError as error:
            damaged(path, self.root / "quarantine", str(error))
            return ""

    def results(self) -> Iterator[tuple[Path, Result]]:
        """Yield all results with the files that hold them."""
        for folder in sorted((self.root / "results").glob("*/*")):
            yield from self._read_results(folder)

    def _read_results(self, folder: Path) -> Iterator[tuple[Path, Result]]:
        for path in sorted(folder.glob("*.json")):
            try:
                yield path, load_result(path)
            except FileNotFoundError:  # cleaned away meanwhile
                continue
            except ValueError as error:
                damaged(path, self.root / "quarantine", str(error))

    def record(self, result: Result) -> dict[str, Any]:
        """Return all that is recorded of a result."""
        path = self.keyed("results", result.key) / f"{result.digest}.json"
        try:
            record: dict[str, Any] = json.loads(read_entry(path))["record"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return record

    def note_formula(self, key: str, formula: dict[str, Any]) -> None:
        """Remember what a formula makes, so that its tensors need not be listed again."""
        found = self.known(key)
        found.formula = formula
        self._dirty(key)

    def reread(self, key: str) -> None:
        """Look into the folders for what lies under a key, and let the index know."""
        self.fresh(key)
        self._dirty(key)

    def _dirty(self, key: str) -> None:
        self.index.put("known", {key: self._known[key].dump()})

    def keep(self, result: Result, manifest: str) -> None:
        """Publish an action's result, last of all that belongs to it."""
        self.note_preimage(result.key, manifest)
        path = self.keyed("results", result.key) / f"{result.digest}.json"
        self._publish(result.dump(), path)
        self.list_tensors(result)
        self.fresh(result.key)
        self._dirty(result.key)

    def rewrite(self, result: Result) -> None:
        """Publish a result once more, whose bytes lie elsewhere now."""
        self._publish(result.dump(), self.keyed("results", result.key) / f"{result.digest}.json")
        self.reread(result.key)

    def add_alias(self, key: str, content_key: str, manifest: str = "") -> None:
        """Let a key lead to another one: same input bytes, or (without manifest) something alike."""
        if manifest:
            self.note_preimage(key, manifest)
        path = self.keyed("aliases", key)
        self._publish(alias_text(key, content_key).encode(), path)
        self.fresh(key)
        self._dirty(key)

    def _publish(self, data: bytes, path: Path) -> None:
        """Publish an entry, whatever lies in its place: the index may know one that is no file any more."""
        if path.is_dir():
            damaged(path, self.root / "quarantine", "a folder lies in its place")
        publish_bytes(data, path, self.temporary)

    def drop(self, result: Result, why: str) -> None:
        """Set a result aside whose bytes are missing or damaged."""
        path = self.keyed("results", result.key) / f"{result.digest}.json"
        if path.exists():
            damaged(path, self.root / "quarantine", why)
        self.fresh(result.key)
        self._dirty(result.key)

    def note_preimage(self, key: str, manifest: str) -> None:
        """Keep the manifest behind a key."""
        path = self.keyed("preimages", key)
        if not path.exists():
            publish_bytes(manifest.encode(), path, self.temporary)

    def note_whole(self, key: str, value: dict[str, Any]) -> None:
        """Keep what a data set is named by, with a sum, since its name is not the hash of it."""
        self.note_preimage(key, json.dumps(value | {"sum": sum_of(value | {"sum": key})}))

    def preimage(self, key: str) -> dict[str, Any] | None:
        """Return the manifest behind a key, if it was ever kept here; a damaged one is set aside."""
        path = self.keyed("preimages", key)
        try:
            return preimage_in(key, read_entry(path))
        except OSError:
            return None
        except ValueError as error:
            damaged(path, self.root / "quarantine", str(error))
            return None

    # -- what is kept of runs --------------------------------------------------------------------------------------

    def states(self, key: str) -> Path:
        """Return the folder of a training's states."""
        return self.keyed("states", key)

    def promote_states(self, folder: Path) -> None:
        """Let the states of a training that was made again (`NAME-again`) take the place of the first ones."""
        import shutil

        if folder.is_dir():
            place = folder.with_name(folder.name.removesuffix("-again"))
            shutil.rmtree(place, ignore_errors=True)
            folder.replace(place)

    def derived(self) -> Path:
        return self.root / "derived"

    def note_run(self, what: str, value: Any) -> None:
        """Remember something of a run: how long it took, for estimates, or how a pack is laid out."""
        self.index.put("history", {what: json.dumps(value)})

    def run_noted(self, what: str) -> Any:
        row = self.index.read_keyed("history", [what]).get(what)
        return json.loads(row) if row else None

    def register(self, project: Path) -> None:
        """Note a project as a root: what its recipes need is not removed by `clean`."""
        path = self.root / "roots" / called(project)
        if not path.exists():
            publish_bytes(str(project).encode(), path, self.temporary, 0o644)

    @contextmanager
    def used_by(self, project: Path) -> Iterator[None]:
        """Let nobody clean up while something for a project is brought here, nor what it needs afterwards."""
        self.prepare()
        self.register(project)
        with self.guard() as guard:
            guard.share(wait=True)
            yield

    def roots(self) -> list[Path]:
        """Return the projects that use this cache and are still there.

        Raises BrokenPromise for an entry that names none, once: it is set aside.
        """
        paths = [self._root(path) for path in sorted((self.root / "roots").glob("*"))]
        return sorted(path for path in paths if (path / FILE).is_file())

    def _root(self, path: Path) -> Path:
        try:
            project = Path(read_entry(path).decode())
            if called(project) != path.name:
                raise ValueError("it stands under another name")
        except ValueError as error:
            found = damaged(path, self.root / "quarantine", str(error))
            hint = "build once in every project that uses this cache, so that what it needs is known again"
            raise BrokenPromise(found.message, hint) from None
        return project

    def close(self) -> None:
        self.index.close()
