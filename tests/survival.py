"""What a project must look like after anything that happened to it, and what can happen to a cache's entries."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sdforge.store.files import OWN_NAME

RECIPE = """\
family = "sd15"

[rehearsal.a]
on = "base"
dataset = "drawings"
steps = 6

[preset]
checkpoint = "a"
"""
IGNORED = ("cache", "out", ".forge", "rehearsal.log", "forge.lock")


@dataclass
class Whole:
    """A project that was built without a fault. files: what lies in `out/`; lock: what it pins."""

    root: Path
    files: dict[str, bytes] = field(default_factory=dict)
    lock: bytes = b""

    def __post_init__(self) -> None:
        self.files, self.lock = outputs(self.root), (self.root / "forge.lock").read_bytes()

    def clone(self, root: Path) -> Path:
        """Copy what a person wrote, and nothing that was made."""
        shutil.copytree(self.root, root, ignore=shutil.ignore_patterns(*IGNORED))
        return root

    def copy(self, root: Path) -> Path:
        """Copy all of it, cache, outputs and lock too."""
        shutil.copytree(self.root, root, symlinks=True)
        return root

    def differences(self, root: Path) -> list[str]:
        """Say in what another project's outputs and lock are not those of this one."""
        found = outputs(root)
        names = sorted(name for name in {*found, *self.files} if found.get(name) != self.files.get(name))
        lock = root / "forge.lock"
        return names + ([] if lock.is_file() and lock.read_bytes() == self.lock else ["forge.lock"])


def outputs(root: Path) -> dict[str, bytes]:
    """Return what lies in `out/`, but for what is moved aside, what tells times (report, list) and where it is."""
    aside = {".replaced", ".written", ".project", "report.html"}
    files = (p for p in (root / "out").rglob("*") if p.is_file() and not aside & set(p.parts))
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def leftovers(root: Path, cache: Path | None = None) -> list[str]:
    """Name what nobody will ever use: unfinished files, workplaces, journals; and what no name of ours is."""
    cache = (cache or root / "cache") / "v1"
    found = [*(cache / "tmp").iterdir()] if (cache / "tmp").is_dir() else []
    for folder in (cache, root):
        found += [p for p in folder.rglob(".*") if p.name.startswith(".tmp-") or p.name.endswith(".part")]
        found += (path for path in folder.rglob(".*-*-*") if OWN_NAME.fullmatch(path.name))
    found += cache.glob("index.db-*")
    return sorted({str(p) for p in found})


def _holds(path: Path) -> tuple[str, str]:
    """Say what an entry holds, in words that no run changes; of those that hold alike the name decides."""
    data = path.read_bytes()
    if path.stem.isdigit():
        return f"state {path.name}", ""
    if data[8:9] == b"{":
        return "pack", path.name
    if data[:1] not in (b"{", b"["):
        return "alias", path.name
    value, _ = json.JSONDecoder().raw_decode(data.decode())  # of losses, which are a line each, the first
    return str(value.get("kind") or sorted(value)) if isinstance(value, dict) else value[0][0], path.name


# -- damages -----------------------------------------------------------------------------------------------------------

Damage = Callable[[Path, Path], None]  # of an entry, with another entry of its kind at hand


def spoil(path: Path, data: bytes) -> None:
    """Write into a file that is read-only."""
    path.chmod(0o644)
    path.write_bytes(data)


def flip(path: Path, other: Path) -> None:  # noqa: ARG001 -- as all damages
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    spoil(path, bytes(data))


def cut(path: Path, other: Path) -> None:  # noqa: ARG001
    spoil(path, path.read_bytes()[:-1])


def halve(path: Path, other: Path) -> None:  # noqa: ARG001
    data = path.read_bytes()
    spoil(path, data[: len(data) // 2])


def empty(path: Path, other: Path) -> None:  # noqa: ARG001
    spoil(path, b"")


def zero(path: Path, other: Path) -> None:  # noqa: ARG001
    spoil(path, bytes(path.stat().st_size))


def lengthen(path: Path, other: Path) -> None:  # noqa: ARG001
    spoil(path, path.read_bytes() + b"\0")


def exchange(path: Path, other: Path) -> None:
    spoil(path, other.read_bytes())


def link_to_other(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to(other)


def link_to_nothing(path: Path, other: Path) -> None:  # noqa: ARG001
    path.unlink()
    path.symlink_to("/nowhere/at/all")


def link_to_itself(path: Path, other: Path) -> None:  # noqa: ARG001
    path.unlink()
    path.symlink_to(path)


def link_to_zeros(path: Path, other: Path) -> None:  # noqa: ARG001
    path.unlink()
    path.symlink_to("/dev/zero")


def folder(path: Path, other: Path) -> None:  # noqa: ARG001
    path.unlink()
    path.mkdir()


def pipe(path: Path, other: Path) -> None:  # noqa: ARG001
    path.unlink()
    os.mkfifo(path)


def remove(path: Path, other: Path) -> None:  # noqa: ARG001
    path.unlink()


def damages() -> dict[str, Damage]:
    """Return all that can happen to an entry: name → what does it."""
    return {
        f.__name__: f
        for f in (
            *(flip, cut, halve, empty, zero, lengthen, exchange),
            *(link_to_other, link_to_nothing, link_to_itself, link_to_zeros, folder, pipe, remove),
        )
    }


def entries(cache: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield every entry of a cache: its kind, its file, another file of its kind.

    They come in the order of what they hold, since their names are digests, which differ between machines.
    """
    for kind in ("objects", "results", "aliases", "preimages", "states"):
        files = sorted((p for p in (cache / "v1" / kind).rglob("*") if p.is_file()), key=_holds)
        for i, path in enumerate(files):
            yield kind, path, files[i - 1]
    index = cache / "v1" / "index.db"
    yield "index", index, next(iter(sorted((cache / "v1" / "objects").glob("*/*"))))
