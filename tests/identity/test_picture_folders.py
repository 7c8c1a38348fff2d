"""A folder of pictures is named by what is learned from it, not by what its files are called."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from sdforge.errors import UsageError
from sdforge.graph import Taken
from sdforge.project import Project
from sdforge.sources import Sources
from sdforge.store import Store
from sdforge.tables import Dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, two with captions beside them. Nobody looks at their pixels here."""
    found = tmp_path / "project" / "pictures"
    found.mkdir(parents=True)
    for name in ("a.png", "b.png", "c.jpg"):
        (found / name).write_bytes(f"pixels of {name}".encode())
    (found / "a.txt").write_text("a {trigger}\n")
    (found / "b.txt").write_text("a dog")
    return found


def identity(folder: Path, **stated: Any) -> str:
    """Look at a folder as a new process does."""
    table = Dataset(path="pictures", **({"caption": "a picture", "trigger": "<x>"} | stated)).model_dump()
    store = Store(folder.parent.parent / "cache")
    store.prepare()
    try:
        return Sources(Project(folder.parent, store.index), store).artifact(Taken("set", "dataset", table)).identity
    finally:
        store.close()


def test_renaming_pictures_changes_nothing(folder: Path) -> None:
    before = identity(folder)
    for suffix in (".png", ".txt"):
        (folder / f"a{suffix}").rename(folder / f"zzz{suffix}")
    assert identity(folder) == before


def test_moving_the_folder_changes_nothing(folder: Path) -> None:
    before = identity(folder)
    elsewhere = folder.parent.parent / "elsewhere" / "pictures"
    elsewhere.parent.mkdir()
    folder.rename(elsewhere)
    assert identity(elsewhere) == before


def test_touching_pictures_changes_nothing(folder: Path) -> None:
    before = identity(folder)
    for path in folder.iterdir():
        os.utime(path, ns=(0, 0))
    assert identity(folder) == before


def test_blanks_around_a_caption_and_other_files_change_nothing(folder: Path) -> None:
    before = identity(folder)
    (folder / "b.txt").write_text("\n a dog \n")
    (folder / "notes.md").write_text("not a caption")
    (folder / "lonely.txt").write_text("no picture")
    assert identity(folder) == before


def test_a_trigger_written_out_is_the_same_caption(folder: Path) -> None:
    before = identity(folder)
    (folder / "a.txt").write_text("a <x>")
    assert identity(folder) == before


def test_the_template_written_out_is_the_same_caption(folder: Path) -> None:
    before = identity(folder)
    (folder / "c.txt").write_text("a picture")
    assert identity(folder) == before


@pytest.mark.parametrize(
    "stated", [{"trigger": "<y>"}, {"caption": "a photo"}, {"repeats": 2}, {"validation": 1}, {"captions": "none"}]
)
def test_what_is_stated_of_captions_and_repeats_is_another_data_set(folder: Path, stated: dict[str, Any]) -> None:
    assert identity(folder, **stated) != identity(folder)


def test_other_pixels_are_another_data_set(folder: Path) -> None:
    before, was = identity(folder), (folder / "a.png").stat()
    time.sleep(0.02)  # coarser than the clock of any file system here
    (folder / "a.png").write_bytes(b"PIXELS of a.png")
    os.utime(folder / "a.png", ns=(was.st_atime_ns, was.st_mtime_ns))
    assert identity(folder) != before


def test_a_picture_more_or_less_is_another_data_set(folder: Path) -> None:
    before = identity(folder)
    (folder / "d.png").write_bytes(b"pixels of a.png")
    more = identity(folder)
    (folder / "d.png").unlink()
    (folder / "c.jpg").unlink()
    assert len({before, more, identity(folder)}) == 3


def test_a_new_caption_beside_a_picture_is_noticed(folder: Path) -> None:
    before = identity(folder)
    (folder / "c.txt").write_text("a hen")
    assert identity(folder) != before


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"trigger": ""}, "a caption names {trigger}, and the data set has no `trigger`"),
        ({"validation": 3}, "3 of 3 pictures are held out, so none is learned from"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(folder: Path, stated: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        identity(folder, **stated)
    assert caught.value.message == f"set: {words}"


def test_a_folder_without_pictures_is_refused(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(UsageError, match="holds no pictures"):
        identity(folder)


def test_a_caption_that_is_no_utf_8_is_refused(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="is not UTF-8"):
        identity(folder)
