"""Class images are a data set that is made: planned, pinned and reused as a training is."""

from __future__ import annotations

import pytest

from tests.planner.conftest import World

CLASS = """
[class_images.cats]
on = "flat"
prompt = "a cat"
count = 4
"""
DREAM = """
[dreambooth.mine]
on = "flat"
dataset = "faces"
prompt = "a sks cat"
prior = "cats"
steps = 10
"""


@pytest.fixture
def trained(world: World) -> World:
    """A DreamBooth with its class drawn, both pinned."""
    world.recipe(CLASS + DREAM)
    world.build()
    assert world.trained == ["r:cats", "r:mine"]
    world.trained.clear()
    return world


@pytest.mark.parametrize(
    "setting", ["steps = 20", "learning_rate = 1e-5", "prior_weight = 0.5", 'prompt = "a zog cat"']
)
def test_another_setting_of_the_training_draws_no_class_anew(setting: str, trained: World) -> None:
    name = setting.partition(" ")[0]
    kept = "".join(line + "\n" for line in DREAM.splitlines() if not line.startswith(name))
    trained.recipe(CLASS + kept + setting)
    assert trained.states() == {"cats": "reuse", "mine": "build"}


@pytest.mark.parametrize(
    ("old", "new"), [("count = 4", "count = 5"), ('"a cat"', '"a dog"'), ("count = 4", "count = 4\nsteps = 3")]
)
def test_another_class_is_drawn_and_what_keeps_it_is_trained_anew(old: str, new: str, trained: World) -> None:
    trained.recipe(CLASS.replace(old, new) + DREAM)
    states = trained.states()
    assert states["cats"] == "build"
    assert states["mine"] in ("build", "maybe")


def test_another_base_draws_another_class(trained: World) -> None:
    trained.checkpoint("flat", unet="changed")
    assert trained.states()["cats"] == "build"


def test_a_class_that_comes_out_as_it_was_trains_nothing(world: World) -> None:
    """Early cut-off: the same pictures under another key are the same data set."""
    world.same_pictures = "cats"
    world.recipe(CLASS + DREAM)
    world.build()
    world.recipe(CLASS.replace("count = 4", "count = 4\nsteps = 3") + DREAM)
    assert world.states() == {"cats": "build", "mine": "maybe"}
    world.trained.clear()
    world.build()
    assert world.trained == ["r:cats"]


def test_a_pin_names_its_pictures_while_they_are_not_here(trained: World) -> None:
    before = trained.plan().steps["r:mine"].key
    trained.forget_results()
    plan = trained.plan()
    assert plan.steps["r:mine"].key == before
    assert plan.steps["r:cats"].artifact is not None
    assert [row[1] for row in plan.steps["r:cats"].artifact.notes["rows"]] == ["a cat"] * 4


def test_a_class_of_which_a_picture_is_gone_is_drawn_again_where_it_is_needed(trained: World) -> None:
    trained.forget_bytes("cats")
    assert trained.states() == {"cats": "build", "mine": "reuse"}
    assert trained.states("r:mine") == {"cats": "reuse", "mine": "reuse"}
    trained.recipe(CLASS + DREAM.replace("steps = 10", "steps = 11"))
    assert trained.states("r:mine") == {"cats": "build", "mine": "build"}


def test_why_names_the_class(trained: World) -> None:
    trained.recipe(CLASS.replace("count = 4", "count = 5") + DREAM)
    assert [cause.text for cause in trained.why("cats")] == ["count 4 → 5"]
    assert [cause.text for cause in trained.why("mine")] == ["`cats` is made first"]
    trained.build("r:cats")
    (cause,) = trained.why("mine")
    assert cause.text == "data set `cats` changed"
    assert cause.behind


def test_a_class_is_no_checkpoint_and_a_checkpoint_no_class(world: World) -> None:
    world.recipe(CLASS + '[cast.x]\ncheckpoint = "cats"\ndtype = "bf16"')
    assert world.misfits() == ["`cats` is a dataset, and a checkpoint belongs here"]
    world.recipe(CLASS + DREAM.replace('prior = "cats"', 'prior = "flat"'))
    assert world.misfits() == ["`flat` is a checkpoint, and a dataset belongs here"]
