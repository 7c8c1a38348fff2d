"""The verdict «nothing to do», kept with all that it rests on, so that the commonest build only looks whether it holds.

A plan is a pure function of texts (recipes, forge.toml, the lock), files (sources, what lies in `out/`, packs of the
store), what the store knows under its keys, and our code. When the plan had nothing to do, its words are kept with the
digest of the texts, the stats of the files and the fingerprint of the code; whatever the store learns ends all
verdicts (`Index.write`). Nothing is kept that rests on a file too young to be trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdforge.errors import UsageError
from sdforge.index import Index
from sdforge.places import FILE, LOCAL, LOCK, RECIPES, cache_folder, code_fingerprint, find_root

if TYPE_CHECKING:
    from sdforge.plan import Plan
    from sdforge.session import Session

YOUNG = 2_000_000_000  # ns, as in the stat cache


def recall(start: Path, targets: list[str], *, locked: bool) -> list[str] | None:
    """Return what to say if there is nothing to do, or None if that has to be found out."""
    try:
        root = find_root(start.resolve())
    except UsageError:
        return None
    index = Index(cache_folder(root) / "v1" / "index.db")
    rows = index.read("verdicts", "id = ?", [_name(root, targets, locked=locked)])
    index.close()
    if not rows:
        return None
    value: dict[str, Any] = json.loads(rows[0][1])
    if _digest(root, value["recipes"]) != value["texts"]:
        return None
    if any(_stat(path) != stat for path, stat in value["stats"]):
        return None
    words: list[str] = value["words"]
    return words


def keep(session: Session, plan: Plan, targets: list[str], words: list[str]) -> None:
    """Keep a verdict, where all that it rests on can be trusted."""
    root = session.project.root
    recipes = sorted({step.node.recipe.home for step in plan.steps.values()})
    stats = {path: _stat(path) for path in sorted(session.relied_on())}
    now = time.time_ns()
    if any(stat and max(stat[3:]) + YOUNG > now for stat in stats.values()):
        return
    texts = _digest(root, recipes)
    value = {"recipes": recipes, "texts": texts, "stats": list(stats.items()), "words": words}
    session.store.index.put("verdicts", {_name(root, targets, locked=session.locked): json.dumps(value)})


def _name(root: Path, targets: list[str], *, locked: bool) -> str:
    text = json.dumps([str(root), targets, locked, code_fingerprint()])
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(root: Path, recipes: list[str]) -> str:
    """Name all texts that a plan reads, and which recipes there are."""
    whole = hashlib.sha256()
    folder = str(root / RECIPES)
    there = sorted(name for name in os.listdir(folder) if name.endswith(".toml")) if os.path.isdir(folder) else []  # noqa: PTH112, PTH208
    whole.update(repr(there).encode())
    for name in (FILE, LOCAL, LOCK, *(f"{RECIPES}/{recipe}.toml" for recipe in recipes)):
        try:
            with open(f"{root}/{name}", "rb") as file:  # noqa: PTH123 -- the commonest build opens these and no more
                text = file.read()
        except OSError:
            text = b"\0"  # no text that could be read holds this
        whole.update(hashlib.sha256(text).digest())
    return whole.hexdigest()


def _stat(path: str) -> list[int] | None:
    """Return [device, inode, size, mtime, ctime], or None if there is nothing."""
    try:
        s = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return [s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns]
