"""Getting what sources name elsewhere: the only part of sdforge that opens a connection for a source.

What was fetched lies in the cache, under its sha256 (a folder: under its pinned revision), and is verified by the hash
that is promised or that the lock has. What this machine has already is linked instead: files in the folders of
`forge.local.toml`, in the Hub's own cache, or among other projects' sources. Offline that is all that is done, for what
the lock or a declared sha256 tells.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from sdforge.errors import BrokenPromise, ResourceError, UsageError
from sdforge.fetch.hosts import Behind, plain, resolve
from sdforge.fetch.wire import Remote, download
from sdforge.graph import Taken
from sdforge.identity import digest_of_text
from sdforge.places import is_utf8
from sdforge.references import Hub, Reference, Url, is_folder, parse
from sdforge.store import COMPLETE, Store
from sdforge.store.files import damaged, publish, resources

Progress = Callable[[str, int, int], None]  # source, bytes done, bytes in all
NEAR = 1024  # bytes within which a size that a page states is right
ONLINE = "run it without --offline"


class Got(NamedTuple):
    """A source that is here now. row: for the lock; how: here, linked or fetched; size: bytes of it."""

    row: dict[str, Any]
    how: str
    size: int
    path: Path


@dataclass
class Fetcher:
    """Gets sources into a store. folders: where else files of this machine may lie; offline: nobody is asked."""

    store: Store
    folders: list[Path]
    progress: Progress
    offline: bool = False

    def resolve(self, taken: Taken, row: dict[str, Any], *, update: bool = False) -> Behind:
        """Return what a source stands for: as the lock has it (row), or with `update` as it is now.

        Raises UsageError, ResourceError.
        """
        text = taken.table["from"]
        pinned = row.get("resolved", "") if row.get("from") == text and not update else ""
        try:
            reference = parse(pinned or text)
            behind = self._told(taken, reference, row if pinned else {}) if self.offline else resolve(reference)
        except UsageError as error:
            raise UsageError(f"{taken.id}: {error.message}", error.hint) from None
        if pinned and behind.pinned != pinned:
            raise BrokenPromise(f"{taken.id}: {pinned} is {behind.pinned} now", hint="`forge lock --update` takes it")
        promised = row.get("files", {}) if pinned else {}
        declared = taken.table.get("sha256") or ""
        if declared and behind.whole:
            raise UsageError(f"{taken.id} is a folder, and sha256 is of a single file")
        files = tuple(self._promise(taken, file, promised.get(file.name, ""), declared) for file in behind.files)
        return replace(behind, files=files)

    def _told(self, taken: Taken, reference: Reference, row: dict[str, Any]) -> Behind:
        """Return what a source stands for by what is known here: its row of the lock, or else its declared sha256.

        Raises ResourceError where neither tells.
        """
        whole, text = is_folder(reference), taken.table["from"]
        size, names = row.get("size", 0), list(row.get("files", {}))
        if not names and isinstance(reference, Url):
            return resolve(reference)  # which asks nobody
        if not names and taken.table.get("sha256") and not whole:
            fetched = sorted(path.name for path in self.store.fetched("", taken.table["sha256"]).glob("*"))
            names = fetched[:1] or ([reference.file.rpartition("/")[2]] if isinstance(reference, Hub) else [])
        if not names:
            raise ResourceError(f"what {text} stands for is not pinned, and --offline asks nobody", ONLINE)
        files = tuple(
            Remote("/".join(map(plain, name.split("/"))), "", size=0 if whole else size) for name in sorted(names)
        )
        return Behind(row.get("resolved", text), files, whole=whole, size=size if whole else 0)

    def _promise(self, taken: Taken, file: Remote, pinned: str, declared: str) -> Remote:
        """Bring together what recipe, lock and host promise of a file. Raises BrokenPromise where they differ."""
        promises = {"forge.toml": declared, "forge.lock": pinned, "its page": file.sha256}
        found = {who: sha256 for who, sha256 in promises.items() if sha256}
        if len(set(found.values())) > 1:
            said = "; ".join(f"{who} says {sha256}" for who, sha256 in found.items())
            raise BrokenPromise(
                f"{taken.id}: there are different promises of {file.name}: {said}",
                hint="if its maker has changed it and you trust that, `forge lock --update` pins the new one",
            )
        return file._replace(sha256=next(iter(found.values()), ""))

    def row(self, taken: Taken, behind: Behind) -> dict[str, Any]:
        """Return what the lock keeps of a source before its bytes are here."""
        files = {file.name: file.sha256 for file in behind.files if file.sha256}
        size = sum(file.size for file in behind.files)
        return {"from": taken.table["from"], "resolved": behind.pinned, "files": files, "size": size}

    def get(self, taken: Taken, behind: Behind) -> Got:
        """Bring a source's files here. Raises BrokenPromise (other bytes), ResourceError, UsageError."""
        hows, digests = set(), {}
        with self.store.lock(f"fetch-{digest_of_text('fetch', behind.pinned)}") as guard:
            guard.acquire(wait=True)
            folder = self.store.fetched(behind.pinned)
            for file in behind.files:
                with resources(f"{file.name} cannot be kept"):
                    how, place = self._bring(taken, behind, file)
                hows.add(how)
                digests[file.name] = self.store.seen.digest(place)
            if behind.whole:
                self._refuse_incomplete(taken, behind, folder)
                with resources(f"{taken.id} cannot be kept"):
                    (folder / COMPLETE).touch()
        path = folder if behind.whole else place
        size = sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())
        how = next(how for how in ("fetched", "linked", "here") if how in hows)
        return Got(self.row(taken, behind) | {"files": digests, "size": size}, how, size, path)

    def link(self, taken: Taken, behind: Behind) -> Got | None:
        """Do as `get` for a single file that this machine has somewhere; None if it has not."""
        if behind.whole or not behind.files[0].sha256 or self._here(behind, behind.files[0]) is None:
            return None
        return self.get(taken, behind)

    def _bring(self, taken: Taken, behind: Behind, file: Remote) -> tuple[str, Path]:
        """Put a file at its place; return how it came, and where it lies."""
        place = self.store.fetched(behind.pinned, "" if behind.whole else file.sha256) / file.name
        named = behind.whole or file.sha256  # else nobody knows yet under what digest it will lie
        self._set_aside(place)
        if named and place.is_file() and file.sha256 in ("", self.store.seen.digest(place)):
            return "here", place
        if file.sha256 and (found := self._here(behind, file)):
            with resources(f"{file.name} cannot be linked"):
                place.parent.mkdir(parents=True, exist_ok=True)
                place.unlink(missing_ok=True)
                place.symlink_to(found)
            return "linked", place
        if self.offline:
            promised = f" (sha256 {file.sha256})" if file.sha256 else ""
            raise ResourceError(
                f"{file.name}{promised} is not on this machine, and --offline opens no connection",
                hint=f"{ONLINE}, or put the file into a folder that forge.local.toml lists",
            )
        part = self._part(behind, file)
        self._set_aside(part)
        sha256 = download(file, part, behind.token, lambda done, total: self.progress(taken.id, done, total))
        if not behind.whole:
            place = self.store.fetched(behind.pinned, sha256) / file.name
            self._set_aside(place)
        publish(part, place)
        return "fetched", place

    @staticmethod
    def _refuse_incomplete(taken: Taken, behind: Behind, folder: Path) -> None:
        """Raise ResourceError for a folder of which the lock does not name all files.

        `forge lock` alone knows only those whose hashes the host tells.
        """
        if behind.size and not (folder / COMPLETE).is_file():
            there = sum((folder / file.name).stat().st_size for file in behind.files)
            if there != behind.size:
                raise ResourceError(f"the lock does not name all files of {taken.id}", ONLINE)

    def _part(self, behind: Behind, file: Remote) -> Path:
        """Return where a file grows: one for each that is pinned, as the lock that is held while it does."""
        return self.store.root / "fetched" / "parts" / digest_of_text("part", f"{behind.pinned} {file.name}")

    def _set_aside(self, place: Path) -> None:
        """Put into quarantine what lies in a file's place and is none: a folder, a pipe."""
        if place.exists() and not place.is_file():
            damaged(place, self.store.root / "quarantine", "what lies in its place was not fetched")

    # -- what this machine has already -----------------------------------------------------------------------------

    def _here(self, behind: Behind, file: Remote) -> Path | None:
        """Find a file by its digest; only files of the right size are hashed."""
        known = self.store.find(file.sha256)
        if known is not None:
            return Path(os.path.realpath(known))
        for path in self._candidates(behind, file):
            real = Path(os.path.realpath(path))
            fits = real.is_file() and self._is_as_large(real.stat().st_size, file)
            if fits and self.store.seen.has(real, file.sha256):
                return real
        return None

    def _candidates(self, behind: Behind, file: Remote) -> Iterator[Path]:
        reference = parse(behind.pinned)
        if isinstance(reference, Hub):
            where = hub_cache() / f"models--{reference.repository.replace('/', '--')}" / "snapshots"
            # of a branch any commit will do, as the file must have the digest that is promised
            revisions = [where / reference.revision, *sorted(where.glob("*"))]
            yield from (revision / (reference.file or file.name) for revision in dict.fromkeys(revisions))
        for folder in self.folders:
            alike = [p for p in folder.rglob(f"*{escape(Path(file.name).suffix)}") if is_utf8(p) and p.is_file()]
            yield from sorted(alike, key=lambda path: (path.name != Path(file.name).name, path))

    @staticmethod
    def _is_as_large(size: int, file: Remote) -> bool:
        """Say whether a size is that of a file that is looked for; where nobody tells that, each may be."""
        return size == file.size if file.size else not file.near or abs(size - file.near) <= NEAR


def hub_cache() -> Path:
    """Return the folder in which the Hub's own programs keep files, by the variables that they read."""
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")  # noqa: PTH111
    return Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub")
