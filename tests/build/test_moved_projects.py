"""A project whose folder is moved, or copied with its cache: what builds wrote to `out/` is still known as ours."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from sdforge.chronicle import Chronicle
from sdforge.index import Index
from tests.quick import Quick
from tests.survival import Whole, outputs

NOT_OURS = "was not ours"
Move = Callable[[Path, Path], object]


@pytest.fixture(params=[Path.rename, shutil.copytree], ids=["moved", "copied"])
def moved(request: pytest.FixtureRequest, whole: Whole, tmp_path: Path) -> Path:
    """A project in another folder than the one in which it was built."""
    move: Move = request.param
    move(whole.copy(tmp_path / "before"), tmp_path / "after")
    return tmp_path / "after"


def build(quick: Quick, root: Path, **environment: str) -> str:
    ran = quick.forge(root, "build", **environment)
    assert ran.code == 0, ran.out + ran.err
    return ran.out + ran.err


def aside(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "out/.replaced").rglob("*") if path.is_file())


def test_what_lies_there_stays_as_it_is(moved: Path, quick: Quick) -> None:
    files = outputs(moved)
    times = {path: path.stat().st_mtime_ns for path in (moved / "out").rglob("*")}
    assert NOT_OURS not in build(quick, moved)
    assert {path: path.stat().st_mtime_ns for path in (moved / "out").rglob("*")} == times
    assert outputs(moved) == files
    assert NOT_OURS not in quick.forge(moved, "report").out
    assert aside(moved) == []


def test_what_its_builds_were_is_still_known(moved: Path, quick: Quick) -> None:
    recipe = moved / "recipes/toy.toml"
    recipe.write_text(recipe.read_text().replace("steps = 6", "steps = 7"))
    assert "steps" in quick.forge(moved, "why", "toy:a").out
    said = quick.forge(moved, "log", "a")
    assert "made with other settings" in said.out, said.err


def test_a_changed_recipe_replaces_it(moved: Path, quick: Quick) -> None:
    recipe = moved / "recipes/toy.toml"
    recipe.write_text(recipe.read_text().replace("steps = 6", "steps = 7"))
    before = outputs(moved)
    assert NOT_OURS not in build(quick, moved)
    assert outputs(moved)["out/toy/toy.safetensors"] != before["out/toy/toy.safetensors"]
    assert aside(moved) == []


@pytest.mark.parametrize("name", ["card.md", "toy.safetensors"])
def test_what_a_person_put_there_is_moved_aside(moved: Path, quick: Quick, name: str) -> None:
    path = moved / "out/toy" / name
    path.chmod(0o644)
    path.write_text("mine")
    assert NOT_OURS in build(quick, moved)
    assert aside(moved) == [name]
    assert (moved / "out/.replaced/toy" / name).read_text() == "mine"


def test_a_shared_cache_tells_projects_apart(whole: Whole, quick: Quick, tmp_path: Path) -> None:
    """The second project never wrote a card; one that lies there is a person's, unless it is a copy of the first's."""
    shared = {"FORGE_CACHE": str(tmp_path / "shared")}
    first, second = (whole.clone(tmp_path / name) for name in ("first", "second"))
    build(quick, first, **shared)
    (second / "out/toy").mkdir(parents=True)
    (second / "out/toy/card.md").write_text("mine")
    shutil.copy(first / "out/toy/preset.json", second / "out/toy")
    assert NOT_OURS in build(quick, second, **shared)
    assert aside(second) == ["card.md"]
    moved = tmp_path / "moved"
    first.rename(moved)
    assert NOT_OURS not in build(quick, moved, **shared)
    (moved / "recipes/toy.toml").write_text((moved / "recipes/toy.toml").read_text().replace("steps = 6", "steps = 7"))
    assert "made with other settings" in quick.forge(moved, "log", "a", **shared).out


@pytest.mark.parametrize("move", [Path.rename, shutil.copytree], ids=["moved", "copied"])
def test_a_shared_cache_goes_on_with_the_history_of_a_moved_project(
    whole: Whole, quick: Quick, tmp_path: Path, move: Move
) -> None:
    shared = {"FORGE_CACHE": str(tmp_path / "shared")}
    before, after = tmp_path / "before", tmp_path / "after"
    build(quick, whole.clone(before), **shared)
    assert str(tmp_path) not in (before / "out/.project").read_text()
    move(before, after)
    recipe = after / "recipes/toy.toml"
    recipe.write_text(recipe.read_text().replace("steps = 6", "steps = 7"))
    assert "6 → 7" in quick.forge(after, "why", "toy:a", **shared).out
    build(quick, after, **shared)
    last, first = remembered(tmp_path / "shared", after).past("toy").builds
    assert last.steps["toy:a"].why == "steps 6 → 7"
    assert remembered(tmp_path / "shared", before).past("toy").builds == (first,)  # those of a copy's are its own


# -- what stands in a shared cache -------------------------------------------------------------------------------------


def remembered(cache: Path, root: Path) -> Chronicle:
    return Chronicle(Index(cache / "v1/index.db"), root, root / "out")


def enter(cache: Path, root: Path, recipe: str, key: str) -> None:
    remembered(cache, root).change(recipe, lambda past: past.with_keys({f"{recipe}:a": key}))


def test_all_recipes_go_along_also_when_a_project_comes_back(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("one", "two", "one")]
    (places[0] / "out").mkdir(parents=True)
    for recipe in ("r", "s"):
        enter(tmp_path, places[0], recipe, "old")
    for old, new in pairwise(places):
        old.rename(new)
        assert remembered(tmp_path, new).moved
        enter(tmp_path, new, "r", f"in {new.name}")
        assert not remembered(tmp_path, new).moved
    found = remembered(tmp_path, places[-1])
    assert (found.last_key("r:a"), found.past("r").before, found.last_key("s:a")) == (
        "in one",
        {"r:a": "in two"},
        "old",
    )


@pytest.mark.parametrize("text", [b"", b"\xff", b"../../../../etc", b"0123456789abcdef"])
def test_a_name_that_nobody_had_is_no_history(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "project/out").mkdir(parents=True)
    (tmp_path / "project/out/.project").write_bytes(text)
    enter(tmp_path, tmp_path / "project", "r", "new")
    assert remembered(tmp_path, tmp_path / "project").past("r").before == {}


def test_a_folder_that_cannot_be_written_to_costs_only_the_history_of_the_next_move(tmp_path: Path) -> None:
    (tmp_path / "project/out/.project").mkdir(parents=True)
    (tmp_path / "project/out/.project/x").touch()
    enter(tmp_path, tmp_path / "project", "r", "new")
    assert remembered(tmp_path, tmp_path / "project").last_key("r:a") == "new"
