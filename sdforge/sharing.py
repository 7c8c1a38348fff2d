"""Trained results ↔ a remote cache: what the lock pins is put there and had from there, and nothing else is believed.

A result travels as a description (`result.json`), its manifest, its tables, and its packs; all are named by sha256,
and an action under `/ac/` names them. Whoever may write to a remote may plant an action: so what comes is checked
against the pin, tensor by tensor, before anything is kept. A wrong one is a miss. What the lock does not pin is taken
where a trusted key has signed a statement that is laid out as a pin.

What lies there and is wrong is written anew by whoever has the result: by a build that has found it so and trained
(`refuse`), and by `mend`. It is read back then, since a server may keep what it has under a name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import xxhash

from sdforge.artifact import Component, artifact_identity, dataset_identity
from sdforge.errors import BrokenPromise, ForgeError
from sdforge.formats.safetensors import read_range
from sdforge.identity import canonical, component_identity, digest_of_text, tensor_identity
from sdforge.lock import Pin
from sdforge.names import is_digest
from sdforge.remotes import Remote
from sdforge.remotes.action_result import MOST, File, decode, encode
from sdforge.signing import sign, signer
from sdforge.store import Store
from sdforge.store.entries import Result
from sdforge.store.files import damaged, open_regular, sha256_of

RESULT, MANIFEST, OBJECT = "result.json", "manifest.json", "objects/"
ACTION = "action"  # as what comes from /ac/ or goes there lies in a work folder
STATEMENT, SIGNATURE = "statement.json", "statement.sig"
SMALL = 64 << 20  # bytes of a description or a table
KEPT = ("loss", "losses", "steps", "sketch", "norm", "seconds", "target", "validation", "recommended")  # of a record

ABSENT = "it is not there"
SIGN_ANEW = "`forge push --key FILE` signs it anew"
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # at what no forge wrote

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Poisoned(BrokenPromise):
    """A remote holds something else than the lock pins."""

    def __init__(self, message: str) -> None:
        super().__init__(message, hint="`forge push --verify` where the result is puts it there anew")


class Put(NamedTuple):
    """A file, and where it lies on a remote cache; size in bytes."""

    space: str
    name: str
    path: Path
    size: int


def action_name(key: str, digest: str) -> str:
    """Return under which name the action of one result of a key lies."""
    return digest_of_text("remote", f"{key} {digest}")


def statement_name(key: str) -> str:
    """Return under which name the signed statement about a content key lies."""
    return digest_of_text("statement", key)


@dataclass
class Sharing:
    """A store and the remote cache behind it. writes: what is trained here is put there."""

    store: Store
    remote: Remote
    writes: bool = False
    trusted: tuple[str, ...] = ()
    doubts: list[str] = field(default_factory=list)  # why statements were not believed
    _offered: dict[tuple[str, str], bool] = field(default_factory=dict)
    _refused: set[tuple[str, str]] = field(default_factory=set)
    _vouched: dict[str, Pin | None] = field(default_factory=dict)

    def offers(self, pin: Pin) -> bool:
        """Say whether the remote has an action for a pinned result; asked once. Raises ResourceError."""
        name = pin.key, pin.digest
        if name not in self._offered:
            self._offered[name] = self.remote.has("ac", action_name(*name))
        return self._offered[name]

    def refuse(self, pin: Pin) -> None:
        """Do not take a pinned result from this remote any more; one that comes of a training is written over it."""
        self._offered[pin.key, pin.digest] = False
        self._refused.add((pin.key, pin.digest))

    def vouched(self, key: str) -> Pin | None:
        """Return what a trusted key says that a content key came out as. Raises ResourceError."""
        if not self.trusted:
            return None
        if key not in self._vouched:
            try:
                self._vouched[key] = self.statement(key)
            except BrokenPromise as error:
                self._vouched[key] = None
                self.doubts.append(f"{error.message}; {error.hint}")
        return self._vouched[key]

    def statement(self, key: str) -> Pin | None:
        """Return what a trusted key says of a content key; None where nobody says anything. Raises BrokenPromise."""
        wrong = f"the statement about {key[:12]} on the remote cache is not believed"
        with self._work() as work:
            if not self.remote.get("ac", statement_name(key), work / ACTION, MOST):
                return None
            try:
                files = {file.path: file for file in decode((work / ACTION).read_bytes())}
                text, signature = (self._bytes(files[name], work, SMALL) for name in (STATEMENT, SIGNATURE))
                if text is None or signature is None:
                    raise BrokenPromise("not all of it is there")
                signer(text, signature.decode(), self.trusted)
                pin = Pin(**json.loads(text))
            except BrokenPromise as error:
                raise BrokenPromise(f"{wrong}: {error.message}", SIGN_ANEW) from None
            except (ValueError, KeyError, TypeError, RecursionError):
                raise BrokenPromise(f"{wrong}: it is none that forge wrote", SIGN_ANEW) from None
        if pin.key != key:
            raise BrokenPromise(f"{wrong}: it is about another key", SIGN_ANEW)
        return pin

    @contextmanager
    def _work(self) -> Iterator[Path]:
        """Give a folder for what is on its way; nothing of it stays."""
        folder = self.store.workplace()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put_statement(self, pin: Pin, key: Path) -> None:
        """Say over a signature what a content key came out as. Raises BrokenPromise where it cannot be said anew."""
        text = canonical({name: getattr(pin, name) for name in pin.__dataclass_fields__}).encode()
        texts = {STATEMENT: text, SIGNATURE: sign(text, key).encode()}
        files = [File(name, hashlib.sha256(data).hexdigest(), len(data)) for name, data in texts.items()]
        with self._work() as work:
            paths = {name: work / name for name in texts}
            for name, data in texts.items():
                paths[name].write_bytes(data)
            self._put_anew(_with_action(files, paths, statement_name(pin.key), work), work)

    # -- push ------------------------------------------------------------------------------------------------------

    def push(self, result: Result, progress: Progress) -> int:
        """Put a result there, bytes first, its action last; return how many bytes had to travel.

        Where all that its action names is there, nothing does. Raises BrokenPromise, ResourceError.
        """
        refused = (result.key, result.digest) in self._refused
        with self._work() as work:
            if not refused and self._is_whole(action_name(result.key, result.digest), work):
                return 0
            puts = self._laid_out(result, work)
            sent = self._put_anew(puts, work) if refused else self._put_lacking(puts, progress)
        self._offered[result.key, result.digest] = True
        return sent

    def mend(self, result: Result, pin: Pin, progress: Progress) -> tuple[str, int]:
        """Read back what lies there of a result, and put it there anew if it is not what was pinned.

        Returns what was wrong ("": nothing) and how many bytes had to travel. Raises BrokenPromise, ResourceError.
        """
        with self._work() as work:
            wrong = self._wrong_there(result, pin, work, progress)
            sent = self._put_anew(self._laid_out(result, work), work) if wrong else 0
        return wrong, sent

    def _is_whole(self, action: str, work: Path) -> bool:
        """Say whether an action is there, and something under each name in it."""
        if not self.remote.get("ac", action, work / ACTION, MOST):
            return False
        try:
            files = decode((work / ACTION).read_bytes())
        except ValueError:
            return False
        return bool(files) and all(self.remote.has("cas", file.sha256) for file in files)

    def _wrong_there(self, result: Result, pin: Pin, work: Path, progress: Progress) -> str:
        """Say what is wrong with what lies there, or nothing."""
        try:
            described = self._described(pin, work)
            if described is None:
                return ABSENT
            there, _, files = described
            if there.needs() != result.needs():
                return "it is laid out in another way"
            names, done = sorted(there.objects()), 0
            total = sum(files[OBJECT + name].size for name in names)
            for name in names:
                path = self._object(files[OBJECT + name], name, work)
                if path is None:
                    return f"{name[:12]} is not there"
                path.unlink()
                done += files[OBJECT + name].size
                progress(done, total)
        except Poisoned as error:
            return error.message
        except UNREADABLE:
            return "it is nothing that forge wrote"
        return ""

    def _laid_out(self, result: Result, work: Path) -> list[Put]:
        """Return the files as which a result lies there, its action last."""
        described = replace(result, record={k: v for k, v in result.record.items() if k in KEPT})
        manifest = canonical(self.store.preimage(result.key))
        if digest_of_text("action", manifest) != result.key:
            raise BrokenPromise(f"the cache has no manifest of {result.key[:12]}", hint="`forge build` notes it again")
        texts = {RESULT: described.dump(), MANIFEST: manifest.encode()}
        paths = {OBJECT + name: self.store.object(name) for name in described.objects()}
        for name, text in texts.items():
            paths[name] = work / name
            paths[name].write_bytes(text)
        files = {name: File(name, sha256_of(path), path.stat().st_size) for name, path in sorted(paths.items())}
        for name, file in files.items():
            if name.startswith(OBJECT) and file.sha256 != name.removeprefix(OBJECT):
                raise BrokenPromise(f"{paths[name]} is damaged", hint="`forge build` sets it aside")
        return _with_action(list(files.values()), paths, action_name(result.key, result.digest), work)

    def _put_lacking(self, puts: list[Put], progress: Progress) -> int:
        """Put there what lies under no name of these; return its bytes."""
        sent, total = 0, sum(put.size for put in puts)
        for put in puts:
            if put.space == "ac" or not self.remote.has(put.space, put.name):
                self.remote.put(put.space, put.name, put.path)
                sent += put.size
            progress(sent, total)
        return sent

    def _put_anew(self, puts: list[Put], work: Path) -> int:
        """Put there what is not there as it should be, and read it back; return its bytes. Raises BrokenPromise.

        The action goes last and in any case, and nothing is read before: the Hub shows bytes with their action only.
        """
        wrong = [put for put in puts if not self._is_there(put, work)]
        if wrong and wrong[-1] != puts[-1]:
            wrong.append(puts[-1])
        for put in wrong:
            self.remote.put(put.space, put.name, put.path)
        for put in wrong:
            if not self._is_there(put, work):
                raise BrokenPromise(
                    f"the remote cache does not let {put.space}/{put.name} be written anew",
                    hint="whoever keeps it has to delete that there",
                )
        return sum(put.size for put in wrong)

    def _is_there(self, put: Put, work: Path) -> bool:
        """Say whether a file lies there, byte for byte."""
        back, sha256 = work / "back", put.name if put.space == "cas" else sha256_of(put.path)
        return self.remote.get(put.space, put.name, back, put.size + 1) and sha256_of(back) == sha256

    # -- pull ------------------------------------------------------------------------------------------------------

    def pull(self, pin: Pin, progress: Progress) -> Result | None:
        """Bring a pinned result here; None if the remote has not all of it. Raises Poisoned, ResourceError."""
        came = self.bring(pin, progress)
        if came is None:
            return None
        self.store.keep(*came)
        return came[0]

    def bring(self, pin: Pin, progress: Progress) -> tuple[Result, str] | None:
        """Do all of `pull` but to keep the result; return it with its manifest. Any thread may do this.

        Raises Poisoned, ResourceError.
        """
        try:
            with self._work() as work:
                return self._bring(pin, work, progress)
        except UNREADABLE as error:
            raise Poisoned(f"the remote cache holds for {pin.key[:12]} what no forge wrote: {error}") from None

    def _bring(self, pin: Pin, work: Path, progress: Progress) -> tuple[Result, str] | None:
        described = self._described(pin, work)
        if described is None:
            return None
        result, manifest, files = described
        names, done = sorted(result.objects()), 0
        total = sum(files[OBJECT + name].size for name in names)
        for name in names:
            if not self._is_here(name):
                path = self._object(files[OBJECT + name], name, work)
                if path is None:
                    return None
                self.store.put_file(path, name)
            done += files[OBJECT + name].size
            progress(done, total)
        self._check_bytes(result)
        return result, manifest

    def _described(self, pin: Pin, work: Path) -> tuple[Result, str, dict[str, File]] | None:
        """Return what lies there of a pinned result but its objects: description, manifest, and the action's files.

        None: it is not there. Raises Poisoned, ResourceError and UNREADABLE.
        """
        if not self.remote.get("ac", action_name(pin.key, pin.digest), work / ACTION, MOST):
            return None
        files = {file.path: file for file in decode((work / ACTION).read_bytes())}
        described, text = (self._bytes(files[name], work, SMALL) for name in (RESULT, MANIFEST))
        if described is None or text is None:
            return None
        if digest_of_text("action", text.decode()) != pin.key:
            raise Poisoned(f"the manifest of {pin.key[:12]} on the remote cache is another one")
        return self._believed(Result.load(described), pin), text.decode(), files

    def _is_here(self, name: str) -> bool:
        """Say whether the store has an object; a damaged one is set aside, so that it can come anew."""
        path = self.store.object(name)
        if not os.path.lexists(path):
            return False
        if path.is_symlink() or not path.is_file() or sha256_of(path) != name:
            damaged(path, self.store.root / "quarantine", "its bytes are not what its name says")
        return path.exists()

    def _bytes(self, file: File, work: Path, limit: int) -> bytes | None:
        path = self._object(file._replace(size=min(file.size, limit)), file.sha256, work)
        return None if path is None else path.read_bytes()

    def _object(self, file: File, sha256: str, work: Path) -> Path | None:
        """Get an object into the work folder. Raises Poisoned if it is not what its name says."""
        path = work / sha256
        if not self.remote.get("cas", sha256, path, file.size + 1):
            return None
        if sha256_of(path) != sha256:
            path.unlink()
            raise Poisoned(f"the remote cache holds other bytes under {sha256[:12]}")
        return path

    def _believed(self, found: Result, pin: Pin) -> Result:
        """Return what of a description the pin vouches for. Raises Poisoned where it says something else."""
        said = {name: component.content for name, component in found.components.items()}
        if found.kind == "dataset":
            named = dataset_identity(found.facts["pictures"], 0)
            packs = tuple(sorted({str(row[0]) for row in found.facts["pictures"]}))
        else:
            named, packs = artifact_identity(pin.kind, said, found.facts), found.packs
        if named != pin.digest or found.facts != pin.facts or said != pin.components or set(found.packs) != set(packs):
            raise Poisoned(f"the remote cache describes another result than the pinned {pin.digest[:12]}")
        components = {n: Component(c.content, c.content, c.table, c.dtype) for n, c in found.components.items()}
        record = {name: value for name, value in found.record.items() if name in KEPT}
        result = Result(
            pin.key, pin.digest, pin.kind, pin.family, components, pin.facts, {}, packs, pin.grade, pin.fingerprint,
            float(found.made), record,
        )  # fmt: skip
        for name in result.objects():
            if not is_digest(name):  # of what a stranger wrote, and it will be part of a path
                raise Poisoned(f"the remote cache calls an object {name[:80]!r}")
        return result

    def _check_bytes(self, result: Result) -> None:
        """Compare tables with the pinned identities, and every tensor's bytes with its table. Raises Poisoned."""
        for name, component in result.components.items():
            table = self.store.table(component)
            named = component_identity((t.name, tensor_identity(t.dtype, t.shape, t.sha256)) for t in table)
            plain = all(t.identity == tensor_identity(t.dtype, t.shape, t.sha256) for t in table)
            if named != component.content or not plain:
                raise Poisoned(f"the remote cache lists other tensors for {name} than are pinned")
            for tensor in table:
                if tensor.spot is None or tensor.spot.file not in result.packs or tensor.spot.offset < 0:
                    raise Poisoned(f"the remote cache does not say where {name}.{tensor.name} lies")
                digests = _hashed(self.store.object(tensor.spot.file), tensor.spot.offset, tensor.size)
                if digests != (tensor.sha256, tensor.xxh3):
                    raise Poisoned(f"the remote cache holds other bytes for {name}.{tensor.name}")


def _with_action(files: list[File], paths: dict[str, Path], name: str, work: Path) -> list[Put]:
    """Return files as they lie on a remote cache, and after them the action that names them."""
    puts = [Put("cas", file.sha256, paths[file.path], file.size) for file in files]
    data, path = encode(files), work / ACTION
    path.write_bytes(data)
    return [*puts, Put("ac", name, path, len(data))]


def _hashed(path: Path, offset: int, size: int) -> tuple[str, str]:
    one, fast = hashlib.sha256(), xxhash.xxh3_128()
    fd = open_regular(path)
    try:
        for chunk in read_range(fd, offset, size):
            one.update(chunk)
            fast.update(chunk)
    except ForgeError:  # the file ends before
        return "", ""
    finally:
        os.close(fd)
    return one.hexdigest(), fast.hexdigest()


def pinned_results(pins: dict[str, dict[str, Pin]], keys: set[str] | None = None) -> Iterator[Pin]:
    """Yield what a lock pins: of these content keys, or all."""
    for key in sorted(pins):
        if keys is None or key in keys:
            yield from (pins[key][digest] for digest in sorted(pins[key]))
