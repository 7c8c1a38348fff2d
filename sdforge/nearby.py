"""What a new project finds beside it: models in folders as other programs have them, told by their headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from sdforge import toml
from sdforge.errors import ForgeError, counted
from sdforge.families import family
from sdforge.formats.layout import read_layout
from sdforge.install.layouts import LAYOUTS
from sdforge.places import LOCAL
from sdforge.report.words import say

# that are looked at: a first look is to take a second, not a minute
MOST_FOLDERS, MOST_ENTRIES, MOST_FILES = 200, 20_000, 200
CALLED = {"lora": "LoRA", "checkpoint": "checkpoint", "embedding": "embedding"}
OTHER = "other file"


class Nearby(NamedTuple):
    """Folders with models, and how many of each kind and family: (kind, family's title or "") → count."""

    folders: list[Path]
    counts: Counter[tuple[str, str]]
    more: bool  # whether there are files that were not looked at


def look_around(project: Path) -> Nearby:
    """Look for models beside a project, and in programs that lie beside it."""
    parent = project.resolve().parent
    beside = [p for p in islice(_children(parent), MOST_FOLDERS) if _is_folder(p) and p != project.resolve()]
    inner = {path for layout in LAYOUTS.values() for path in layout.folders.values()}
    places = [parent / path.rpartition("/")[2] for path in inner] + [base / path for path in inner for base in beside]
    folders: list[Path] = []
    files: list[Path] = []
    for folder in sorted(set(places)):
        if _is_folder(folder) and (found := list(islice(_models(folder), MOST_FILES + 1))):
            folders.append(folder)
            files += found
    return Nearby(folders, Counter(map(_told, files[:MOST_FILES])), len(files) > MOST_FILES)


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # a folder that may not be listed has nothing for us
        return []


def _is_folder(path: Path) -> bool:
    """Say whether a folder is there; in one that is not for us there is nothing."""
    with suppress(OSError):
        return path.is_dir()
    return False


def _models(folder: Path) -> Iterator[Path]:
    """Yield the models among the first entries of a folder, which may hold anything."""
    return (p for p in islice(folder.rglob("*"), MOST_ENTRIES) if p.suffix == ".safetensors")


def _told(path: Path) -> tuple[str, str]:
    """Return kind and family of a file, as its header tells them."""
    try:
        layout = read_layout(path)
    except (ForgeError, OSError):
        return OTHER, ""
    if layout.kind not in CALLED:
        return OTHER, ""
    return CALLED[layout.kind], family(layout.family).title if layout.family else ""


def welcome(project: Path) -> None:
    """Say what lies beside a new project, and name its folders in `forge.local.toml`."""
    found = look_around(project)
    if not found.folders:
        return
    say(f"  beside it: {', '.join(_sentence(found.counts))}{' and more' if found.more else ''}")
    if not (project / LOCAL).exists():
        (project / LOCAL).write_text(f"folders = {toml.value(list(map(str, found.folders)))}\n", encoding="utf-8")
        say(f"  {LOCAL} names their folders: `forge add NAME FILE` makes a file of them a source")


def _sentence(counts: Counter[tuple[str, str]]) -> list[str]:
    """Return for each kind how many there are, and of which families."""
    words = []
    for kind in (*CALLED.values(), OTHER):
        own = {title: count for (each, title), count in sorted(counts.items()) if each == kind}
        if own:
            families = ", ".join(f"{count} {title}" for title, count in own.items() if title)
            words.append(counted(sum(own.values()), kind) + (f" ({families})" if families else ""))
    return words
