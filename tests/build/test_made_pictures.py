"""A data set that is made, with the real `forge`: drawn, kept, cleaned around, drawn again, pinned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Project, new_project

pytestmark = pytest.mark.usefixtures("forked")

RECIPE = """\
family = "sd15"

[class_images.cats]
on = "base"
prompts = ["a cat", "a house"]
count = 3
steps = 1
guidance = 1
resolution = 64
precision = "fp32"

[rehearsal.a]
on = "base"
dataset = "drawings"
prior = "cats"
steps = 2
"""


@pytest.fixture
def drawn(tmp_path: Path, toy_checkpoint: Path) -> Project:
    project = new_project(tmp_path / "project", toy_checkpoint, RECIPE)
    assert project.build().built == ["cats", "a"]
    return project


def pictures(project: Project) -> list[Path]:
    shown = json.loads(project.forge("show", "toy:cats", "--json").out)
    assert shown["kind"] == "dataset"
    return [project.root / "cache" / "v1" / "objects" / sha[:2] / sha for sha, _ in shown["files"].values()]


def test_a_class_is_drawn_once_and_stays(drawn: Project, tmp_path: Path) -> None:
    files = pictures(drawn)
    assert len(files) == 3
    states = drawn.root / "cache" / "v1" / "states"
    assert not list(states.rglob("*.png"))

    # nothing to do, and nothing of it goes: not even where no recipe asks for it any more
    assert drawn.build().built == []
    drawn.edit('prior = "cats"\n', "")
    recipe = drawn.recipe.read_text()
    drawn.recipe.write_text(recipe[: recipe.index("[class_images")] + recipe[recipe.index("[rehearsal") :])
    drawn.forge("clean")
    drawn.recipe.write_text(RECIPE)
    assert all(file.is_file() for file in files)
    assert drawn.build().built == []

    # a person sees what it holds
    said = drawn.forge("show", "toy:cats").out
    assert "class_images → dataset" in said
    assert "pictures 3" in said
    assert f'1.png    "a cat" in {files[0]}' in said
    assert f'2.png    "a house" in {files[1]}' in said
    assert "reuse" in drawn.forge("list", "--json").out

    # a picture that is gone is drawn again where it is needed, and comes out as it was
    files[0].unlink()
    assert drawn.build().built == []
    assert drawn.build("toy:cats").built == ["cats"]
    assert files[0].is_file()

    # elsewhere the lock knows which pictures they were
    clone = drawn.clone(tmp_path / "clone")
    events = [json.loads(line) for line in clone.forge("plan", "--json", "toy").out.splitlines()]
    keys = {e["target"]: e["key"] for e in events if e["event"] == "action"}
    own = [json.loads(line) for line in drawn.forge("plan", "--json", "toy").out.splitlines()]
    assert keys == {e["target"]: e["key"] for e in own if e["event"] == "action"}
    assert 'kind = "dataset"' in drawn.lock


def test_settings_that_contradict_each_other_are_refused_before_anything_runs(
    tmp_path: Path, toy_checkpoint: Path
) -> None:
    project = new_project(tmp_path / "project", toy_checkpoint, RECIPE.replace("count = 3", 'prompt = "a cat"'))
    ran = project.forge("build", "toy", code=2)
    assert "toy.toml:6" in ran.err + ran.out
    assert "not in both" in ran.err + ran.out


def test_a_class_that_is_called_as_the_subject_is_refused_before_it_is_drawn(
    tmp_path: Path, toy_checkpoint: Path
) -> None:
    text = RECIPE.replace("[rehearsal.a]", "[dreambooth.a]").replace("prior =", 'prompt = "a house"\nprior =')
    project = new_project(tmp_path / "project", toy_checkpoint, text)
    for command in ("check", "plan", "build"):
        said = project.forge(command, code=2).err
        assert "a picture of `cats` says 'a house', as the subject's do" in said
    project.edit('prompt = "a house"', 'prompt = "a sks house"')
    project.forge("check")
