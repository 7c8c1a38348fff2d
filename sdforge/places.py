"""Where things lie: the project's files, its cache, and the code that reads them. Light, for the commonest build."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

from sdforge.errors import UsageError

FILE, LOCAL, LOCK, RECIPES, OUT = "forge.toml", "forge.local.toml", "forge.lock", "recipes", "out"
VRAM = r"^(\d+(\.\d+)?\s?(GB|GiB|MB|MiB))?$"  # how an amount of memory is written
UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}
DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"
CACHE = "FORGE_CACHE"
METHODS = "FORGE_METHODS"  # further folders with methods, for those under development


def amount(text: str) -> int:
    """Return an amount of memory as it is written (`VRAM`), in bytes; empty: 0."""
    number = text.rstrip("GiBM ")
    return int(float(number) * UNITS[text[len(number) :].strip()]) if text else 0


def find_root(start: Path) -> Path:
    """Return the nearest folder with a `forge.toml`, from `start` upwards. Raises UsageError."""
    for folder in (start, *start.parents):
        if (folder / FILE).is_file():
            return _utf8(folder)
    raise UsageError(f"{start} is in no project: there is no {FILE} here or above", hint="`forge init` makes one")


def cache_folder(root: Path) -> Path:
    """Return the cache of a project: its own, or the one that `FORGE_CACHE` names. Raises UsageError as `expanded`."""
    named = os.environ.get(CACHE)
    return _utf8(expanded(named).resolve()) if named else root / "cache"


def expanded(path: str) -> Path:
    """Return a path of this machine in which `~` or `~NAME` may stand for a home. Raises UsageError for nobody's."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"{path} is in no home of this machine", hint="write the path out") from None


def is_utf8(path: Path) -> bool:
    """Say whether a path can be written down: lock, index and reports hold text, and a file's name may be any bytes."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _utf8(folder: Path) -> Path:
    """Return a folder whose path can be written down. Raises UsageError for another one."""
    if not is_utf8(folder):
        raise UsageError(f"the path {str(folder)!a} is not UTF-8", hint="rename the folder, or name another")
    return folder


def code_folders() -> list[Path]:
    """Return the folders in which methods are looked for: the package, and those of `FORGE_METHODS`."""
    extra = [Path(p) for p in os.environ.get(METHODS, "").split(os.pathsep) if p]
    return [Path(__file__).parent, *extra]


@cache
def code_fingerprint() -> str:
    """Name the code that reads recipes: what was read with other code is read again."""
    rows, folders = [], [str(root) for root in code_folders()]
    for folder in folders:  # grows while it is walked
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(".py"):
                    info = entry.stat()
                    rows.append((folder, entry.name, info.st_size, info.st_mtime_ns))
                elif entry.name not in ("__pycache__", "demo", "run", "report") and entry.is_dir():
                    folders.append(entry.path)
    return hashlib.sha256(repr(sorted(rows)).encode()).hexdigest()
