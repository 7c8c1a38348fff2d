"""How a plan is written: whose targets they are, and on a narrow terminal."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from sdforge.report.progress import names
from sdforge.report.table import row
from sdforge.report.words import hung
from tests.planner.conftest import World, toy_world

SOFT = '[weighted_sum.soft]\ncheckpoints = ["flat", "ink"]\nweights = [0.6, 0.4]\n'
TAKES = '[cast.half]\ncheckpoint = "one:soft"\ndtype = "fp16"\n'


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


@pytest.fixture
def world(tmp_path: Path) -> World:
    return toy_world(tmp_path)


def test_the_recipe_is_left_out_where_only_one_is_wanted(world: World) -> None:
    world.recipe(SOFT, "one")
    assert names(world.plan("one:soft")) == {"one:soft": "soft"}
    world.recipe(TAKES, "two")
    assert names(world.plan("two:half")) == {"one:soft": "one:soft", "two:half": "half"}


def test_of_several_recipes_every_target_is_named_with_its_own(world: World) -> None:
    world.recipe(SOFT, "one")
    world.recipe(SOFT, "two")
    assert list(names(world.plan("one:soft", "two:soft")).values()) == ["one:soft", "two:soft"]


def test_a_reason_goes_below_its_target_where_the_terminal_is_narrow(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.recipe(SOFT, "one")
    (step,) = world.plan("one:soft").steps.values()
    reason = "a reason of so many words that no line of eighty letters can hold it behind the columns of a plan"
    wide = row(step, "soft", reason)
    assert wide.endswith(reason)
    assert "\n" not in wide, "files and pipes get a line for each target"
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((80, 24)))
    first, *others = row(step, "soft", reason).split("\n")
    assert first == wide.removesuffix(reason).rstrip()
    assert all(len(line) <= 80 and line.startswith(" " * 6) for line in others)
    assert " ".join(line.strip() for line in others) == reason
    assert "\n" not in row(step, "soft", "short")


def test_a_word_that_is_longer_than_the_line_is_not_broken() -> None:
    path = "x" * 90
    assert hung("head", path, 80) == f"head\n      {path}"
