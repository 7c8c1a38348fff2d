"""A cache of bounded size, `[cache] max_size`: after a build, and by `forge clean`, what is over it is collected.

In this order, the oldest of each first, until the cache is small enough:

1. latents and text encodings, which are made again where they lack
2. train states of trainings that are done; then those of unfinished ones that nobody has touched for a day
3. results of class A (merges, bakes, casts, exports): they can be made again, bit for bit
4. previews

Trained results are never collected, nor is anything that the lock of another registered project names, nor what this
build was asked for. What is left may then be more than the bound, and that is said.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sdforge.errors import UsageError
from sdforge.lock import read_lock
from sdforge.orders import state_key
from sdforge.places import LOCK
from sdforge.report.words import safe, size
from sdforge.session import Session
from sdforge.store import Store
from sdforge.store.entries import Result

DAY = 86_400.0  # seconds for which an unfinished training's states are left alone
NOT_COUNTED = ("locks", "index.db")


@dataclass(frozen=True)
class Candidate:
    """Something that may go. what: for people; age: seconds since 1970; result: where it is one."""

    what: str
    age: float
    paths: tuple[Path, ...] = ()
    result: Result | None = None


@dataclass
class Collected:
    """What went: what → how many, and their bytes. left: bytes that the cache holds now."""

    counts: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    left: int = 0


def keep_bounded(session: Session, *, as_json: bool, dry_run: bool = False) -> None:
    """Collect what is over the project's bound, and say so. While others build on the cache nothing is done."""
    bound = session.project.max_cache
    guard = session.store.guard()
    if not guard.acquire(wait=False):
        return
    try:
        found = collect(session, bound, dry_run=dry_run)
    finally:
        guard.release()
    over = found.left > bound
    if as_json:
        counts = {"files": sum(found.counts.values()), "bytes": found.bytes, "left": found.left, "dry_run": dry_run}
        print(json.dumps({"v": 1, "event": "bounded", **counts, "removed": dict(found.counts)}))
        return
    if found.counts:
        what = ", ".join(f"{n} {word}" for word, n in found.counts.items())
        verb = "would be removed" if dry_run else "removed"
        _say(f"  {verb} to keep the cache below {size(bound)}: {what} ({size(found.bytes)})")
    if over:
        _say(f"  the cache holds {size(found.left)}, more than max_size: what is left is trained, pinned or asked for")


def collect(session: Session, bound: int, *, dry_run: bool) -> Collected:
    """Remove candidates until what is left is within the bound. Raises UsageError for another project's broken lock."""
    store = session.store
    found = Collected(left=sum(_size(path) for path in _all(store)))
    if found.left <= bound:
        return found
    users = Counter(name for _, result in store.results() for name in result.objects())
    users.update(store.source_tables())
    for each in candidates(session):
        if found.left <= bound:
            break
        paths = list(each.paths)
        if each.result is not None:
            users.subtract(each.result.objects())
            paths += [store.object(name) for name in sorted(each.result.objects()) if users[name] <= 0]
        freed = sum(map(_size, paths))
        found.counts[each.what] += 1
        found.bytes += freed
        found.left -= freed
        if not dry_run:
            for path in paths:
                path.unlink(missing_ok=True)
            if each.result is not None:
                store.reread(each.result.key)
    return found


def candidates(session: Session) -> Iterator[Candidate]:
    """Yield what may go, in the order in which it goes."""
    store = session.store
    derived = [Candidate("derived caches", _age(p), (p,)) for p in store.derived().glob("*/*.safetensors")]
    yield from sorted(derived, key=lambda each: each.age)
    yield from _states(store)
    spared = _spared(session)
    results = [(path, result) for path, result in store.results() if result.key not in spared]
    for what, wanted in (("results of class A", _is_made_again), ("previews", _is_preview)):
        chosen = [Candidate(what, result.made, (path,), result) for path, result in results if wanted(result)]
        yield from sorted(chosen, key=lambda each: each.age)


def _is_made_again(result: Result) -> bool:
    return result.grade == "A" and result.kind not in ("files", "pictures")


def _is_preview(result: Result) -> bool:
    return result.kind == "pictures"


def _states(store: Store) -> Iterator[Candidate]:
    """Yield train states: of trainings that are done, then of those that nobody has gone on with for a day."""
    manifests = (store.preimage(result.key) for _, result in store.results() if result.kind != "files")
    done = {state_key(manifest) for manifest in manifests if manifest and "settings" in manifest}
    folders = [p for p in (store.root / "states").glob("*/*") if p.is_dir()]
    ages = {folder: max((_age(p) for p in folder.iterdir()), default=0.0) for folder in folders}
    finished = [folder for folder in folders if folder.name in done]
    idle = [folder for folder in folders if folder.name not in done and ages[folder] < time.time() - DAY]
    for what, group in (("train states", finished), ("unfinished train states", idle)):
        for folder in sorted(group, key=lambda each: ages[each]):
            yield Candidate(what, ages[folder], tuple(sorted(folder.iterdir())))


def _spared(session: Session) -> set[str]:
    """Return the keys of what was asked for, and of all that other projects' locks name."""
    keys: set[str] = set()
    for step in session.planner().steps.values():
        if step.result and not session.graph.users.get(step.id):
            keys.add(step.result.key)
    for root in session.store.roots():
        path = root / LOCK
        if root == session.project.root or not path.is_file():
            continue
        try:
            lock = read_lock(path.read_bytes(), str(path))
        except UsageError as error:
            raise UsageError(f"what {root} needs of the cache is not known: {error.message}", error.hint) from None
        keys |= set(lock.results) | {row["key"] for row in lock.targets.values() if "key" in row}
    return keys


def _all(store: Store) -> Iterator[Path]:
    for path in store.root.rglob("*"):
        if path.relative_to(store.root).parts[0] not in NOT_COUNTED and path.is_file():
            yield path


def _size(path: Path) -> int:
    return path.lstat().st_size if path.exists() else 0


def _age(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _say(text: str) -> None:
    print(safe(text, sys.stdout))
