"""What a build wrote to `out/` is known as ours without the cache, and what a person put there as theirs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sdforge import written
from sdforge.store.files import own_name
from sdforge.written import Noted, Written
from tests.build.test_faults import PUBLISHES
from tests.quick import Quick
from tests.survival import Whole, leftovers, outputs

NOT_OURS = "was not ours"


@pytest.fixture
def root(whole: Whole, tmp_path: Path) -> Path:
    """A project that was built, and has lost its cache's index since."""
    root = whole.copy(tmp_path / "project")
    (root / "cache/v1/index.db").unlink()
    return root


def build(quick: Quick, root: Path, **environment: str) -> str:
    ran = quick.forge(root, "build", **environment)
    assert ran.code == 0, ran.out + ran.err
    return ran.out + ran.err


def aside(root: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (root / "out/.replaced").rglob("*") if path.is_file()}


def change(root: Path) -> None:
    recipe = root / "recipes/toy.toml"
    recipe.write_text(recipe.read_text().replace("steps = 6", "steps = 7"))


def test_a_lost_index_leaves_all_as_it_is(root: Path, quick: Quick) -> None:
    times = {path: path.stat().st_mtime_ns for path in (root / "out").rglob("*")}
    assert NOT_OURS not in build(quick, root)
    assert {path: path.stat().st_mtime_ns for path in (root / "out").rglob("*")} == times


def test_another_cache_replaces_what_the_first_one_wrote(root: Path, quick: Quick, tmp_path: Path) -> None:
    before = outputs(root)
    change(root)
    assert NOT_OURS not in build(quick, root, FORGE_CACHE=str(tmp_path / "other"))
    assert outputs(root)["out/toy/toy.safetensors"] != before["out/toy/toy.safetensors"]
    assert aside(root) == {}


@pytest.mark.parametrize("name", ["report.html", "card.md"])
def test_what_a_person_changed_is_moved_aside(root: Path, quick: Quick, name: str) -> None:
    path = root / "out/toy" / name
    path.write_text(path.read_text() + "mine")
    mine = path.read_text()
    assert NOT_OURS in build(quick, root)
    assert aside(root) == {name: mine}


def test_a_file_for_a_folder_and_folders_for_files_are_moved_aside(root: Path, quick: Quick) -> None:
    place = root / "out/toy"
    shutil.rmtree(place)
    place.write_text("mine")
    assert "it is in out/.replaced/toy.file now" in build(quick, root)
    assert aside(root) == {"toy.file": "mine"}
    for name in ("toy.safetensors", "card.md"):
        (place / name).unlink()
        (place / name / "within").mkdir(parents=True)
    assert build(quick, root).count(NOT_OURS) == 2
    assert sorted(path.name for path in (root / "out/.replaced/toy").iterdir()) == ["card.md", "toy.safetensors"]
    assert (place / "card.md").is_file()


def test_a_folder_that_is_a_link_to_nowhere_is_left_alone(root: Path, quick: Quick) -> None:
    shutil.rmtree(root / "out/toy")
    (root / "out/toy").symlink_to(root / "unplugged")
    ran = quick.forge(root, "build")
    assert (ran.code, "is a link to what is not there" in ran.err) == (4, True)
    assert (root / "out/toy").is_symlink()


def test_a_file_in_the_place_of_all_outputs_is_named(root: Path, quick: Quick) -> None:
    shutil.rmtree(root / "out")
    (root / "out").write_text("mine")
    ran = quick.forge(root, "build")
    assert (ran.code, "out is no folder" in ran.err) == (4, True)
    assert (root / "out").read_text() == "mine"


def test_what_a_person_took_back_from_before_is_moved_aside(root: Path, quick: Quick) -> None:
    card = (root / "out/toy/card.md").read_text()
    change(root)
    build(quick, root)
    (root / "out/toy/card.md").write_text(card)
    (root / "cache/v1/index.db").unlink()
    assert NOT_OURS in build(quick, root)
    assert aside(root) == {"card.md": card}


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"\xff[1]\n{}\n[[],1,2]\n")])
def test_without_its_list_a_file_counts_as_a_persons(root: Path, quick: Quick, spoil: Callable[[Path], object]) -> None:
    spoil(root / "out/.written/toy")
    report = (root / "out/toy/report.html").read_text()
    assert NOT_OURS in build(quick, root)
    assert aside(root) == {"report.html": report}
    assert NOT_OURS not in build(quick, root)


def test_what_was_written_before_there_were_lists_is_known_by_the_index(
    whole: Whole, quick: Quick, tmp_path: Path
) -> None:
    root = whole.copy(tmp_path / "project")
    build(quick, root)
    (root / "out/.written/toy").unlink()
    card = root / "out/toy/card.md"
    card.write_text(card.read_text() + "mine")
    change(root)
    assert NOT_OURS in build(quick, root)
    assert list(aside(root)) == ["card.md"]


def test_a_killed_build_had_said_what_it_was_about_to_write(whole: Whole, quick: Quick, tmp_path: Path) -> None:
    root = whole.clone(tmp_path / "project")
    assert quick.forge(root, "build", FORGE_FAULT=f"late-kill:{PUBLISHES}").code == -9  # the report's, the last one
    assert (root / "out/toy/report.html").is_file()
    (root / "cache/v1/index.db").unlink()
    assert NOT_OURS not in build(quick, root)
    assert aside(root) == {}
    assert leftovers(root) == []


# -- the list itself ---------------------------------------------------------------------------------------------------


def test_until_a_file_is_there_what_was_there_before_counts_too(tmp_path: Path) -> None:
    lists, path = Written(tmp_path), tmp_path / "toy/card.md"
    old, new = Noted("1" * 64, "2" * 64), Noted("3" * 64)
    lists.announce(path, old)
    lists.confirm(path, old)
    lists.announce(path, new)
    assert Written(tmp_path).noted(path) == [old, new]
    assert not lists.is_there(path, new)
    lists.confirm(path, new)
    assert lists.is_there(path, new)
    assert lists.noted(tmp_path / "toy/other.md") == lists.noted(tmp_path / "other/card.md") == []


@pytest.mark.parametrize(
    "line", ['["toy/card.md", [], {}]', '["toy/card.md"]', '["toy/card.md", 1, 2, 3]', "7", '"abc"']
)
def test_a_line_of_another_kind_is_nobodys_bytes(tmp_path: Path, line: str) -> None:
    (tmp_path / ".written").mkdir()
    (tmp_path / ".written/toy").write_text(line)
    noted = Written(tmp_path).noted(tmp_path / "toy/card.md")
    assert "1" * 64 not in {file.sha256 for file in noted}


def test_a_line_that_was_cut_off_costs_no_other(tmp_path: Path) -> None:
    lists, path = Written(tmp_path), tmp_path / "toy/card.md"
    first, second = Noted("1" * 64), Noted("2" * 64)
    lists.announce(path, first)
    with (tmp_path / ".written/toy").open("ab") as opened:
        opened.write(b'\n["toy/card.md", "33')
    lists.announce(path, second)
    assert Written(tmp_path).noted(path) == [first, second]


def test_a_list_grows_to_some_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "LONGEST", 10)
    paths = [tmp_path / "toy" / name for name in ("a", "b", "c")]
    for n in range(20):
        for path in paths:
            Written(tmp_path).announce(path, Noted(f"{n:064}"))
        assert len((tmp_path / ".written/toy").read_bytes().splitlines()) <= 14
    assert Written(tmp_path).noted(paths[0]) == [Noted(f"{n:064}") for n in (18, 19)]


def test_nothing_is_written_through_a_link_in_a_lists_place(tmp_path: Path) -> None:
    (tmp_path / ".written").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".written/toy").symlink_to(tmp_path / "mine")
    os.mkfifo(tmp_path / ".written/pipe")
    for name in ("toy", "pipe"):
        with pytest.raises(OSError, match=name):
            Written(tmp_path).announce(tmp_path / name / "card.md", Noted(own_name()))
    assert (tmp_path / "mine").read_text() == "mine"
