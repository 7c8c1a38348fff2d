"""A folder of pictures is named by what is learned from it, not by what its files are called."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from sdforge.errors import UsageError
from sdforge.graph import Taken
from sdforge.index import Index
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


@pytest.mark.parametrize(
    ("inner", "hint"),
    [
        ("10_ohwx", 'folders in it do, called as kohya\'s scripts have them: layout = "kohya"'),
        ("best", "best in it does: name that folder, or put them together"),
        ("", "they end in .png, .jpg, .jpeg, .webp, .avif"),
    ],
)
def test_a_folder_without_pictures_says_where_they_may_be(folder: Path, inner: str, hint: str) -> None:
    if inner:
        (folder / inner).mkdir()
        (folder / "a.png").rename(folder / inner / "a.png")
    for path in folder.glob("*.*"):
        path.unlink()
    with pytest.raises(UsageError) as caught:
        identity(folder)
    assert caught.value.hint == hint


def test_the_mark_that_some_editors_put_before_utf_8_is_no_part_of_a_caption(folder: Path) -> None:
    before = identity(folder)
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfa dog")
    assert identity(folder) == before


def test_a_caption_that_is_no_utf_8_is_refused(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="is not UTF-8"):
        identity(folder)


@pytest.mark.parametrize("ending", ["png", "gif"])
def test_a_name_that_is_no_utf_8_is_refused_and_shown(folder: Path, ending: str) -> None:
    (folder / os.fsdecode(b"caf\xe9." + ending.encode())).write_bytes((folder / "a.png").read_bytes())
    with pytest.raises(UsageError, match=r"the name 'caf\\udce9\.") as caught:
        identity(folder)
    assert caught.value.hint == "rename it"


def test_a_text_that_is_far_too_long_is_no_caption(folder: Path) -> None:
    (folder / "a.txt").write_text("a dog, " * 20_000)
    with pytest.raises(UsageError, match="is no caption"):
        identity(folder)


def test_many_pictures_make_the_disk_wait_no_oftener_than_few(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = 0
    write = Index.write

    def counted(index: Index, *arguments: Any) -> None:
        nonlocal times
        times += 1
        write(index, *arguments)

    monkeypatch.setattr(Index, "write", counted)
    identity(folder)
    few, times = times, 0
    for n in range(40):
        (folder / f"{n}.png").write_bytes(f"pixels of {n}".encode())
    identity(folder)
    assert times == few


# -- folders as kohya's scripts have them, templates, masks ------------------------------------------------------------


def rows(folder: Path, **stated: Any) -> list[list[Any]]:
    """What is learned from a folder."""
    table = Dataset(path="pictures", **stated).model_dump()
    store = Store(folder.parent.parent / "cache")
    store.prepare()
    try:
        found: list[list[Any]] = (
            Sources(Project(folder.parent, store.index), store).artifact(Taken("set", "dataset", table)).notes["rows"]
        )
        return found
    finally:
        store.close()


@pytest.fixture
def kohya(folder: Path) -> Path:
    """`10_ohwx woman` with two pictures, one of them captioned, `1_woman` with one, and a folder of another kind."""
    for name in ("10_ohwx woman", "1_woman", "logs"):
        (folder / name).mkdir()
    for name in ("a.png", "a.txt", "b.png"):
        (folder / name).rename(folder / "10_ohwx woman" / name)
    (folder / "c.jpg").rename(folder / "1_woman" / "c.jpg")
    return folder


def test_kohyas_folders_say_repeats_and_words(kohya: Path) -> None:
    found = rows(kohya, layout="kohya", trigger="<x>")
    assert sorted(row[1:] for row in found) == [["a <x>", 10], ["ohwx woman", 10], ["woman", 1]]


def test_kohyas_repeats_are_multiplied_with_the_data_sets(kohya: Path) -> None:
    assert sorted(row[2] for row in rows(kohya, layout="kohya", trigger="<x>", repeats=2)) == [2, 20, 20]


def test_a_folder_that_is_not_kohyas_is_refused_with_the_way_out(folder: Path) -> None:
    with pytest.raises(UsageError, match="holds no pictures") as caught:
        rows(folder, layout="kohya")
    assert '"10_ohwx woman"' in caught.value.hint


def test_captions_may_end_in_caption(folder: Path) -> None:
    (folder / "a.caption").write_text("an owl")
    found = {row[1] for row in rows(folder, captions="caption", caption="a picture")}
    assert found == {"an owl", "a picture"}


def test_a_picture_without_a_caption_is_shown_with_every_template(folder: Path) -> None:
    found = rows(folder, templates=["a photo of {trigger}", "a good {trigger}"], trigger="<x>")
    assert sorted(row[1] for row in found) == ["a <x>", "a dog", "a good <x>", "a photo of <x>"]
    assert len({row[0] for row in found}) == 3


def test_a_mask_is_no_picture_and_belongs_to_what_is_learned(folder: Path) -> None:
    before = identity(folder)
    (folder / "a.mask.png").write_bytes(b"pixels of a mask")
    assert identity(folder) == before
    some = identity(folder, masks="file")
    assert some != before
    (folder / "a.mask.png").write_bytes(b"other pixels of it")
    assert identity(folder, masks="file") not in (some, before)
    assert identity(folder, masks="alpha") not in (some, before)
    assert sorted(len(row[3]) for row in rows(folder, masks="file", caption="x", trigger="y")) == [0, 0, 64]


def test_kohyas_folders_that_are_shown_never_are_left_alone_and_too_often_refused(kohya: Path) -> None:
    (kohya / "1_woman").rename(kohya / "0_woman")
    assert sorted(row[2] for row in rows(kohya, layout="kohya", trigger="<x>")) == [10, 10]
    (kohya / "0_woman").rename(kohya / f"{10**20}_woman")
    with pytest.raises(UsageError, match="says to show its pictures 100,000,000,000,000,000,000 times") as caught:
        rows(kohya, layout="kohya", trigger="<x>")
    assert caught.value.hint == "10,000 at most"
