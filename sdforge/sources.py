"""What nobody makes: a file or folder on the disk → an `Artifact`, looked at once and remembered by its stat.

Every byte of a source is read once, when it is first seen, for the sha256 of the file and of every tensor. After that
a null build only compares stats; anything changed within two seconds of the look is looked at once more.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdforge import datasets
from sdforge.artifact import Artifact, Component, Spot, Tensor, artifact_identity
from sdforge.dtypes import ITEM_SIZE
from sdforge.errors import BrokenPromise, UsageError, counted
from sdforge.families import family
from sdforge.formats import READER_VERSION
from sdforge.graph import Taken
from sdforge.identity import H, component_identity, tensor_identity
from sdforge.pictures import PICTURES
from sdforge.places import is_utf8
from sdforge.project import Project
from sdforge.references import is_folder, is_remote, parse
from sdforge.store import COMPLETE, Store
from sdforge.store.files import CHUNK, SETTLED, Stat, leads_out, open_regular, sha256_of, stat_of, within

if TYPE_CHECKING:
    from sdforge.formats.layout import Found, Layout
    from sdforge.formats.safetensors import Header
    from sdforge.import_step import What

STATED = ("prediction", "guidance_free")  # facts that a source can state of a checkpoint
Progress = Callable[[str, int, int], None]  # what, bytes done, bytes in all


def silent(what: str, done: int, total: int) -> None:
    pass


@dataclass
class Sources:
    """The sources of a project, as artifacts."""

    project: Project
    store: Store
    progress: Progress = silent
    pinned: Callable[[str], dict[str, Any]] = lambda _: {}  # id → what the lock says of a source
    quick: bool = False  # read headers and texts only; what was never hashed gets a name for the moment
    glances: dict[str, Any] = field(default_factory=dict)  # what such names stand for
    _artifacts: dict[str, Artifact] = field(default_factory=dict)
    _seen: dict[str, Any] = field(default_factory=dict)
    _stats: dict[str, dict[str, Stat]] = field(default_factory=dict)  # of the files, when they were last looked at
    _paths: dict[str, Path] = field(default_factory=dict)
    _missing: set[str] = field(default_factory=set)
    _imported_as: dict[Path, Path] = field(default_factory=dict)  # file → the object it was converted to

    def expect(self, taken: list[Taken]) -> None:
        """Look many sources up in the stat cache, in one go."""
        ids = []
        for each in taken:
            try:
                path = self._path(each, search=False)
            except UsageError:
                continue  # said with its place when it is asked for
            ids += [self._id(each, path)] if path else []
        self._seen |= self.store.index.read_keyed("seen", ids)

    def artifact(self, taken: Taken) -> Artifact:
        """Return a source as an artifact. Raises UsageError for what cannot be used, BrokenPromise for another file."""
        if taken.id not in self._artifacts:
            path = self._path(taken, search=True)
            assert path is not None
            value = self._look(taken, path)
            self._refuse_other_than_fetched(taken, value)
            self._artifacts[taken.id] = _stated(taken, value)
        return self._artifacts[taken.id]

    def forget(self, taken: Taken) -> None:
        """Look at a source again when it is next asked for."""
        self._artifacts.pop(taken.id, None)

    def looked_at(self) -> set[str]:
        """Return the files and folders of all sources, and the places where one was looked for in vain."""
        return {place for stats in self._stats.values() for place in stats} | self._missing

    def changed(self, taken: Taken) -> bool:
        """Say whether a source has changed since it was looked at: asked after the action that read it."""
        before = self._stats.get(taken.id)
        return before is not None and any(stat_of(path) != stat for path, stat in before.items())

    # -- where it lies ---------------------------------------------------------------------------------------------

    def _path(self, taken: Taken, *, search: bool) -> Path | None:
        """Return where a source lies: in the project, or in the folders of this machine."""
        if taken.id in self._paths and self._paths[taken.id].exists():
            return self._paths[taken.id]
        name = taken.table["path" if taken.kind == "dataset" else "from"]
        if taken.kind == "source" and is_remote(name):
            return self._fetched(taken, name, search=search)
        pictures = "pictures lie in the project: copy or move the folder there" if taken.kind == "dataset" else ""
        try:
            path = self._paths[taken.id] = within(self.project.root, name)
        except UsageError as error:
            raise UsageError(f"{taken.id}: {error.message}", pictures or error.hint) from None
        if path.exists() or not search:
            return path
        self._missing.add(str(path))
        if pictures:
            raise UsageError(f"{taken.id}: there is no {name} in the project", hint=pictures)
        if found := next(self._elsewhere(name, taken.table.get("sha256")), None):
            return found
        raise self._nowhere(f"{taken.id}: there is no {name} in the project")

    def _nowhere(self, sentence: str) -> UsageError:
        """Return the error for a file that is neither in the project, as the sentence says, nor in the folders."""
        folders, hint = self.project.folders, 'put it there, or name its folder in forge.local.toml: folders = ["…"]'
        if gone := next((folder for folder in folders if not folder.is_dir()), None):
            shown = gone.relative_to(self.project.root) if gone.is_relative_to(self.project.root) else gone
            hint = f"forge.local.toml lists {shown}, which is no folder"
        where = f", nor in the {counted(len(folders), 'folder')} of forge.local.toml" if folders else ""
        return UsageError(sentence + where, hint)

    def fetched_folder(self, taken: Taken) -> Path | None:
        """Return the folder in which a source from elsewhere lies, or would; None for others and what is not pinned."""
        name = taken.table.get("from", "")
        if taken.kind != "source" or not is_remote(name):
            return None
        row = self.pinned(taken.id)
        pinned = row if row.get("from") == name else {}
        if is_folder(parse(name)):
            return self.store.fetched(pinned["resolved"]) if pinned.get("resolved") else None
        sha256 = taken.table.get("sha256") or next(iter(pinned.get("files", {}).values()), "")
        return self.store.fetched("", sha256) if sha256 else None

    def _fetched(self, taken: Taken, name: str, *, search: bool) -> Path | None:
        """Return where `fetch` has put a source that comes from elsewhere. Raises UsageError where it has not."""
        try:
            folder, whole = self.fetched_folder(taken), is_folder(parse(name))
        except UsageError as error:
            raise UsageError(f"{taken.id}: {error.message}", error.hint) from None
        found = None
        if folder is not None and whole:
            names = (COMPLETE, *self.pinned(taken.id).get("files", {}))
            found = folder if all((folder / each).is_file() for each in names) else None
        elif folder is not None:
            found = next((path for path in sorted(folder.glob("*")) if path.is_file()), None)
        if found is not None:
            self._paths[taken.id] = found
        elif search:
            self._missing |= {str(folder)} if folder else set()
            raise UsageError(
                f"{taken.id} comes from {name}, and has not been fetched", hint=f"`forge fetch {taken.id}` gets it"
            )
        return found

    def _refuse_other_than_fetched(self, taken: Taken, value: dict[str, Any]) -> None:
        """Refuse a source from elsewhere whose files are not those that its place was pinned with: linked ones change.

        Raises BrokenPromise.
        """
        row = self.pinned(taken.id)
        if taken.kind != "source" or "resolved" not in row or row.get("from") != taken.table["from"]:
            return
        for name, sha256 in value.get("files", {}).items():
            if (pinned := row.get("files", {}).get(name, sha256)) != sha256:
                raise BrokenPromise(
                    f"{taken.id}: {name} is not the file that was fetched: {sha256} instead of {pinned}",
                    hint=f"`forge fetch {taken.id}` gets it again",
                )

    def _elsewhere(self, name: str, sha256: str | None) -> Iterator[Path]:
        """Find a source in this machine's folders: by its digest where one is declared, else by its name."""
        if sha256 and (known := self.store.find(sha256)) and known != self.store.object(sha256):
            yield known
        parts = Path(name).parts
        for folder in self.project.folders:
            named = filter(is_utf8, folder.rglob(escape(parts[-1])))
            for path in sorted(p for p in named if p.parts[-len(parts) :] == parts):
                if not sha256 or path.is_dir() or self.store.seen.has(path, sha256):
                    yield path
        if sha256:
            for folder in self.project.folders:
                alike = sorted(filter(is_utf8, folder.rglob(f"*{escape(Path(name).suffix)}")))
                yield from (p for p in alike if p.is_file() and self.store.seen.has(p, sha256))

    # -- what it is ------------------------------------------------------------------------------------------------

    def _id(self, taken: Taken, path: Path) -> str:
        if taken.kind == "dataset":
            text = json.dumps([taken.table[key] for key in datasets.DECIDE])
            return f"dataset:{datasets.VERSION}:{path}:{text}"
        table = taken.table
        said = [table.get("pickle") == "allow", table.get("embedding", ""), table.get("use_ema", False)]
        return f"source:{READER_VERSION}:{path}" + (f":{json.dumps(said)}" if any(said) else "")

    def _look(self, taken: Taken, path: Path) -> dict[str, Any]:
        """Return what is known of a source, reading it if it is new or has changed."""
        identifier = self._id(taken, path)
        row = self._seen.get(identifier)
        if row is None:
            row = self.store.index.read_keyed("seen", [identifier]).get(identifier)
        if row and row[1]:
            before = {place: Stat(*stat) for place, stat in json.loads(row[0]).items()}
            value: dict[str, Any] = json.loads(row[2])
            if all(stat_of(place) == stat for place, stat in before.items()) and self._kept(value):
                self._stats[taken.id] = before
                return value
        if self.quick:
            return self._pictures(taken, path)[0] if _is_pictures(taken, path) else self._glance(taken, path)
        before_that: Any = None
        for _ in range(4):
            looked = time.time_ns()
            with self.store.seen.gathering():
                value, places = self._pictures(taken, path) if _is_pictures(taken, path) else self._read(taken, path)
            stats = {str(place): stat for place in places if (stat := stat_of(place))}
            newest = max(max(stat.mtime_ns, stat.ctime_ns) for stat in stats.values())
            # times may lie in the future: then two readings must agree
            if newest <= looked or before_that == (value, stats):
                break
            before_that = (value, stats)
        else:
            raise BrokenPromise(f"{path} keeps changing while it is read")
        text = json.dumps(value, separators=(",", ":"))
        settled = int(newest + SETTLED <= looked)
        if (
            not row
            or (row[1], row[2]) != (settled, text)
            or json.loads(row[0]) != {k: list(v) for k, v in stats.items()}
        ):
            self.store.index.put("seen", {identifier: (json.dumps(stats), settled, text)})
        self._stats[taken.id] = stats
        return value

    def _kept(self, value: dict[str, Any]) -> bool:
        """Say whether the store still has what it kept of a source: tables of tensors, words, turned matrices."""
        objects = [row[2] for row in value.get("components", {}).values()] + value.get("objects", [])
        return all(self.store.object(name).exists() for name in objects)

    def _layout(self, taken: Taken, path: Path) -> Layout:
        """Say where everything of a source lies. Raises UsageError with the source's name."""
        from sdforge.formats.embedding import read_named
        from sdforge.formats.layout import read_layout, refused_pickle
        from sdforge.formats.safetensors import read_header
        from sdforge.formats.single_file import with_ema
        from sdforge.import_step import needs_import

        averaged = bool(taken.table.get("use_ema"))
        if averaged and path.is_dir():
            hint = "leave `use_ema` out, or name the single file"
            raise UsageError(f"{taken.id} is a folder, and only single files hold an averaged copy (EMA)", hint=hint)

        def header_of(file: Path) -> Header:
            what = needs_import(file)
            if what == "pickle" and taken.table.get("pickle") != "allow":
                raise refused_pickle(file)
            place = self._imported(taken, file, what) if what else file
            return with_ema(place, read_header(place)) if averaged else read_header(place)

        try:
            if name := taken.table.get("embedding"):
                return read_named(path, header_of(path), name)
            return read_layout(path, header_of)
        except UsageError as error:
            raise UsageError(f"{taken.id}: {error.message}", error.hint) from None

    def _imported(self, taken: Taken, path: Path, what: What) -> Path:
        """Return the object of the store into which a file was converted, once for its bytes."""
        from sdforge.import_step import VERSION, import_file

        if not is_remote(taken.table["from"]):
            self._refuse_outside(taken, path)
        key = f"imported:{VERSION}:{what}:{self.store.seen.digest(path.absolute())}"
        sha256 = self.store.index.read_keyed("parsed", [key]).get(key)
        if not sha256 or not self.store.object(sha256).is_file():
            work = self.store.workplace()
            try:
                import_file(path, work / "imported", what)
                sha256 = sha256_of(work / "imported")
                self.store.put_file(work / "imported", sha256)
            finally:
                shutil.rmtree(work, ignore_errors=True)
            self.store.index.put("parsed", {key: sha256})
        self._imported_as[path] = self.store.object(sha256)
        return self._imported_as[path]

    def _read(self, taken: Taken, path: Path) -> tuple[dict[str, Any], list[Path]]:
        from sdforge.formats.tokenizer import tokenizer_identity
        from sdforge.formula import common_dtype

        layout = self._layout(taken, path)
        if not is_remote(taken.table["from"]):  # what was fetched may be a link to where it lay already
            for file in layout.files:
                self._refuse_outside(taken, file)
        digests, tensors, broken = self._hash(taken, layout)
        homes = [self._imported_as[file].name if file in self._imported_as else "" for file in layout.files]
        components: dict[str, Any] = {}
        rows: dict[str, list[Tensor]] = {}
        for tensor in layout.tensors:
            sha256, xxh3 = tensors[tensor]
            identity = tensor_identity(tensor.dtype, tensor.shape, sha256)
            # a matrix that its file holds transposed is an object of the store, as nothing else has its bytes
            home = homes[tensor.file] or digests[tensor.file]
            spot = Spot(sha256, 0) if tensor.turned else Spot(home, tensor.offset)
            rows.setdefault(tensor.component, []).append(
                Tensor(tensor.name, tensor.dtype, tensor.shape, identity, sha256, xxh3, spot)
            )
        for name, table in rows.items():
            identity = component_identity((t.name, t.identity) for t in table)
            components[name] = [identity, identity, self.store.put_table(table), common_dtype(t.dtype for t in table)]
        if layout.tokenizer:
            identity = tokenizer_identity(layout.tokenizer)
            text = json.dumps(layout.tokenizer, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
            components["tokenizer"] = [identity, identity, self.store.put_bytes(text.encode()), ""]
        value = {
            "kind": layout.kind,
            "family": layout.family,
            "components": components,
            "facts": layout.facts,
            "digest": artifact_identity(layout.kind, {name: row[0] for name, row in components.items()}, layout.facts),
            "notes": layout.notes | ({"broken": broken} if broken else {}),
            "passed": dict(layout.passed),
            "files": {
                str(file.relative_to(path)) if path.is_dir() else file.name: digest
                for file, digest in zip(layout.files, digests, strict=True)
            },
            "size": sum(file.stat().st_size for file in layout.files),
            "objects": [tensors[tensor][0] for tensor in layout.tensors if tensor.turned] + [h for h in homes if h],
        }
        folders = {file.parent for file in layout.files} | {path} if path.is_dir() else set()
        return value, [*layout.files, *sorted(folders)]

    def _glance(self, taken: Taken, path: Path) -> dict[str, Any]:
        """Return what a source's headers tell. Its identities are good for nothing but comparing shapes and kinds."""
        from sdforge.formula import common_dtype

        layout = self._layout(taken, path)
        components: dict[str, Any] = {}
        for name in dict.fromkeys(tensor.component for tensor in layout.tensors):
            place = f"glance:{path}:{name}"
            self.glances[place] = [
                Tensor(t.name, t.dtype, t.shape, H("glance", [str(path), name, t.name]))
                for t in layout.tensors
                if t.component == name
            ]
            components[name] = [H("glance", place), "", place, common_dtype(t.dtype for t in self.glances[place])]
        if layout.tokenizer:
            place = f"glance:{path}:tokenizer"
            self.glances[place] = layout.tokenizer
            components["tokenizer"] = [H("glance", place), "", place, ""]
        return {
            "kind": layout.kind,
            "family": layout.family,
            "components": components,
            "facts": layout.facts,
            "digest": "",
            "notes": layout.notes,
            "passed": {},
            "files": {},
            "size": 0,
        }

    def _pictures(self, taken: Taken, path: Path) -> tuple[dict[str, Any], list[Path]]:
        return self._read_dataset(taken, path) if taken.kind == "dataset" else self._read_picture(path)

    def _hash(self, taken: Taken, layout: Layout) -> tuple[list[str], dict[Found, tuple[str, str]], list[str]]:
        """Read every file once: sha256 of the files, sha256 and xxh3 of the tensors, and which hold NaN or Inf."""
        import xxhash

        from sdforge.formats.finite import Finite
        from sdforge.formats.layout import transposed
        from sdforge.store.behind import Behind

        total = sum(file.stat().st_size for file in layout.files)
        digests, tensors, broken, done = [], {}, [], 0
        for i, file in enumerate(layout.files):
            mine = sorted((t for t in layout.tensors if t.file == i), key=lambda t: t.offset)
            stat, looked = stat_of(file), time.time_ns()
            with ExitStack() as stack:
                fd = open_regular(self._imported_as.get(file, file))
                stack.callback(os.close, fd)
                whole = stack.enter_context(Behind())
                place = 0
                for tensor in mine:
                    for chunk in _chunks(fd, place, tensor.offset):
                        whole.update(chunk)
                        done += len(chunk)
                    one, fast, kept = hashlib.sha256(), xxhash.xxh3_128(), bytearray()
                    finite = Finite(tensor.dtype)
                    for chunk in _chunks(fd, tensor.offset, tensor.offset + tensor.size):
                        whole.update(chunk)
                        finite.update(chunk)
                        if tensor.turned:
                            kept += chunk
                        else:
                            one.update(chunk)
                            fast.update(chunk)
                        done += len(chunk)
                        self.progress(taken.id, done, total)
                    if tensor.turned:
                        data = transposed(kept, tensor.shape[0], ITEM_SIZE[tensor.dtype])
                        one.update(data)
                        fast.update(data)
                        self.store.put_bytes(data)
                    tensors[tensor] = (one.hexdigest(), fast.hexdigest())
                    broken += [f"{tensor.component}.{tensor.name}"] if finite.broken else []
                    place = tensor.offset + tensor.size
                for chunk in _chunks(fd, place, None):
                    whole.update(chunk)
                    done += len(chunk)
                digests.append(whole.hexdigest())
            if file in self._imported_as:
                digests[-1] = self.store.seen.digest(file.absolute())
                continue
            if stat is not None:
                self.store.seen.remember(file.absolute(), stat, digests[-1], looked)
        return digests, tensors, broken

    def _read_dataset(self, taken: Taken, path: Path) -> tuple[dict[str, Any], list[Path]]:
        def digest(file: Path) -> str:
            return file.name if self.quick else self.store.seen.digest(file.absolute())

        return datasets.read_dataset(
            taken.id, taken.table, path, digest, lambda file: self._refuse_outside(taken, file)
        )

    def _refuse_outside(self, taken: Taken, file: Path) -> None:
        """Refuse a file that a link leads to where nobody declared anything."""
        if leads_out(file, [self.project.root, *self.project.folders]):
            raise UsageError(
                f"{taken.id}: {file} is a link that leads out of the project",
                hint="folders that forge.local.toml lists may be linked to",
            )

    def _read_picture(self, path: Path) -> tuple[dict[str, Any], list[Path]]:
        """Name a single picture."""
        sha256 = path.name if self.quick else self.store.seen.digest(path.absolute())
        value = {
            "kind": "picture",
            "identity": H("picture", sha256),
            "rows": [[sha256, "", 1]],
            "names": {sha256: [""]},
        }
        return value | {"without": []}, [path]

    def picture_files(self, taken: Taken) -> dict[str, str]:
        """Return sha256 → path of a data set's pictures and masks, or of a single picture."""
        path = self._path(taken, search=True)
        assert path is not None
        value = self._look(taken, path)
        return {sha256: str(path / names[0]) for sha256, names in value["names"].items()}


def _is_pictures(taken: Taken, path: Path) -> bool:
    """Say whether a source is a data set, or a picture that is none of those that carry an embedding."""
    if taken.kind == "dataset" or path.suffix.lower() not in PICTURES or path.is_dir():
        return taken.kind == "dataset"
    from sdforge.formats.embedding import carries_embedding

    return not taken.table.get("embedding") and not carries_embedding(path)


def _chunks(fd: int, start: int, end: int | None) -> Iterator[bytes]:
    place = start
    while end is None or place < end:
        chunk = os.pread(fd, CHUNK if end is None else min(CHUNK, end - place), place)
        if not chunk:
            if end is None:
                return
            raise UsageError("a file became shorter while it was read")
        yield chunk
        place += len(chunk)


def _refuse_other(taken: Taken, files: dict[str, str]) -> None:
    """Refuse a source of which no file is the one that its sha256 declares. Raises BrokenPromise."""
    declared = taken.table.get("sha256")
    if declared and (len(files) > 1 or any("/" in name for name in files)):
        raise UsageError(
            f"{taken.id} is a folder, and sha256 is of a single file", hint="forge.lock pins what a folder holds"
        )
    if declared and files and declared not in files.values():
        found = next(iter(files.values()))
        raise BrokenPromise(
            f"{taken.id} is not the file that its sha256 declares: {found} instead of {declared}",
            hint="get the declared file, or change the sha256 if you trust this one",
        )


def _stated(taken: Taken, value: dict[str, Any]) -> Artifact:
    """Turn what was read into an artifact, with what the recipe or forge.toml states of it."""
    table = taken.table
    if taken.kind == "dataset":
        notes = {key: value[key] for key in ("rows", "names", *datasets.TOLD)} | {
            "trigger": [table["trigger"]] if table["trigger"] else [],
            "validation": table["validation"],
        }
        return Artifact("dataset", whole=value["identity"], notes=notes)
    if value["kind"] == "picture":
        _refuse_other(taken, {"": value["rows"][0][0]})
        return Artifact("picture", whole=value["identity"], notes={"rows": value["rows"], "names": value["names"]})
    _refuse_other(taken, value["files"])
    facts = dict(value["facts"])
    if overriding := {fact: table[fact] for fact in STATED if table.get(fact)}:
        if value["kind"] != "checkpoint" or not value["family"]:
            raise UsageError(f"{taken.id} is no checkpoint, and states {' and '.join(overriding)}", hint="leave it out")
        facts = family(value["family"]).stated(facts | overriding)
    notes = {key: note for key, note in value["notes"].items() if key != "unsaid" or not table.get("prediction")}
    phrase = str(notes.get("trigger", ""))  # as files state words: with commas between them
    notes["trigger"] = [word for part in phrase.split(",") if (word := part.strip())]
    notes |= {key: table[key] for key in ("licence", "trigger") if table.get(key)}
    notes |= {"files": value["files"], "size": value["size"], "passed": value["passed"]}
    if facts == value["facts"]:
        notes["digest"] = value["digest"]
    components = {name: Component(*row) for name, row in value["components"].items()}
    return Artifact(value["kind"], value["family"], components, facts, notes)
