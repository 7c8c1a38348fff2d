"""A project whose folder is moved, or copied with its cache: what builds wrote to `out/` is still known as ours."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

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
