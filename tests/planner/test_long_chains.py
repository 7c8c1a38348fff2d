"""Recipes of many targets, one behind the other: planned, explained and computed without deep recursion."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sdforge.commands import MOST_BEHIND, _causes_json, _tell_causes
from sdforge.errors import RecipeError
from sdforge.explain import Cause, in_short
from sdforge.graph import link_recipes
from sdforge.needs import MOST_NESTED
from sdforge.project import Project
from tests.planner.conftest import NoIndex, World

LONG = 400


def chain(length: int, first: float = 0.6) -> str:
    """Return a recipe in which each merge takes the one before."""
    text = f'[weighted_sum.m0]\ncheckpoints = ["flat", "ink"]\nweights = [{first}, 0.4]\n'
    for i in range(1, length):
        text += f'[weighted_sum.m{i}]\ncheckpoints = ["m{i - 1}", "ink"]\nweights = [0.9, 0.1]\n'
    return text


def test_a_long_chain_is_planned_in_passes_that_are_not_too_deep(world: World) -> None:
    world.recipe(chain(LONG))
    steps = list(world.plan(f"r:m{LONG - 1}").steps.values())
    ends = [i for i, step in enumerate(steps) if not step.within]
    assert ends[-1] == LONG - 1
    assert all(later - earlier - 1 <= MOST_NESTED for earlier, later in pairwise([-1, *ends]))
    assert len(ends) == -(-LONG // (MOST_NESTED + 1))


def test_a_long_chain_is_explained(world: World) -> None:
    world.recipe(chain(LONG))
    plan = world.plan()
    world.last = {step.id: step.key for step in plan.steps.values()}
    world.store.preimages |= {step.key: json.loads(step.manifest) for step in plan.steps.values()}
    world.recipe(chain(LONG, first=0.5))
    causes = world.why(f"m{LONG - 1}")
    assert in_short(causes).startswith(f"`m{LONG - 2}` changed")
    for _ in range(LONG - 1):
        (cause,) = causes
        causes = cause.behind
    assert [cause.text for cause in causes] == ["weights [0.6, 0.4] → [0.5, 0.4]"]


def test_of_a_long_chain_as_much_is_said_as_a_person_reads(capsys: pytest.CaptureFixture[str]) -> None:
    causes = [Cause("the first")]
    for _ in range(2 * MOST_BEHIND):
        causes = [Cause("the next", behind=causes)]
    _tell_causes(causes, set())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == MOST_BEHIND
    assert lines[-1].endswith("the next …")
    assert json.dumps(_causes_json(causes, set())).count("the next") == MOST_BEHIND


def test_what_several_have_in_common_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    causes = [Cause("the first")]
    for i in range(30):  # told each time, this would be a thousand million lines
        causes = [Cause(f"a{i}", behind=causes), Cause(f"b{i}", behind=causes)]
    _tell_causes(causes, set())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 61
    assert sum(line.endswith("(as above)") for line in lines) == 30
    assert json.dumps(_causes_json(causes, set())).count('"text"') == 61


def test_mistakes_of_many_recipes_that_name_each_other_are_told_together(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    for i in range(LONG):
        text = f'family = "sd15"\n[cast.x]\ncheckpoint = "r{i + 1}:x"\ndtype = "none"\n'
        (tmp_path / "recipes" / f"r{i}.toml").write_text(text)
    index: Any = NoIndex()
    with pytest.raises(RecipeError) as caught:
        link_recipes(Project(tmp_path, index), ["r0"])
    assert len({problem.place.file for problem in caught.value.problems if problem.place}) == LONG
