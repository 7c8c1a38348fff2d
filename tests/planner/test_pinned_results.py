"""Trained results are pinned: the table of DESIGN §4.4, as far as it is planning and nothing is remote."""

from __future__ import annotations

import pytest

from sdforge.errors import BrokenPromise
from tests.planner.conftest import World

LORA = """
[lora.sketchy]
on = "flat"
dataset = "sketches"
steps = 10
"""
BAKE = """
[bake.inked]
checkpoint = "flat"
loras.sketchy = {}
"""


@pytest.fixture
def trained(world: World) -> World:
    """A LoRA that is trained and pinned."""
    world.recipe(LORA + BAKE)
    world.build()
    world.trained.clear()
    return world


def pinned(world: World) -> str:
    ((digest, _),) = (item for pins in world.lock.results.values() for item in pins.items())
    return digest


def other_result(world: World) -> str:
    """Let the store hold only another result than the pinned one; return its digest."""
    lock = world.lock.dump()
    world.forget_results()
    world.build(salt="elsewhere", pin=False)
    world.trained.clear()
    assert world.lock.dump() == lock
    result = world.plan().steps["r:sketchy"].result
    assert result is not None
    return result.digest


def test_pinned_and_in_the_store_is_reused(trained: World) -> None:
    step = trained.plan().steps["r:sketchy"]
    assert step.result is not None
    assert (step.state, step.result.digest, step.differs) == ("reuse", pinned(trained), False)


def test_pinned_and_only_another_one_here_is_reused_and_differs(trained: World) -> None:
    other = other_result(trained)
    step = trained.plan().steps["r:sketchy"]
    assert step.result is not None
    assert (step.state, step.result.digest, step.differs) == ("reuse", other, True)
    assert other != pinned(trained)


def test_what_follows_from_another_result_is_planned_with_that_one(trained: World) -> None:
    before = trained.plan().steps["r:inked"].key
    other_result(trained)
    assert trained.plan().steps["r:inked"].key != before


def test_pinned_and_nothing_here_is_trained_with_that_reason(trained: World) -> None:
    trained.forget_results()
    step = trained.plan().steps["r:sketchy"]
    assert (step.state, step.reason) == ("build", "the pinned result is not to be had")
    assert [cause.text for cause in trained.why("sketchy")] == ["the pinned result is not to be had"]


def test_a_pin_names_its_result_while_no_bytes_are_here(trained: World) -> None:
    """So what is behind it is planned as if it were here."""
    before = trained.plan().steps["r:inked"].key
    trained.forget_results()
    assert trained.plan().steps["r:inked"].key == before


def test_not_pinned_and_in_the_store_is_reused(trained: World) -> None:
    trained.lock.results.clear()
    assert trained.states()["sketchy"] == "reuse"


def test_of_several_that_are_not_pinned_the_first_made_is_reused(trained: World) -> None:
    first = pinned(trained)
    trained.lock.results.clear()
    trained.build(retrain=["r:sketchy"], pin=False)
    trained.lock.results.clear()
    step = trained.plan().steps["r:sketchy"]
    assert step.result is not None
    assert step.result.digest == first


def test_of_several_the_pinned_one_is_reused(trained: World) -> None:
    trained.build(retrain=["r:sketchy"])
    step = trained.plan().steps["r:sketchy"]
    assert step.result is not None
    assert len(trained.store.known(step.key).results) == 2
    assert step.result.digest == pinned(trained) == step.result.digest


def test_not_pinned_and_not_in_the_store_is_trained(world: World) -> None:
    world.recipe(LORA)
    assert world.states() == {"sketchy": "build"}


def test_retrain_trains_what_is_pinned_and_here(trained: World) -> None:
    plan = trained.plan(retrain=["r:sketchy"])
    assert plan.steps["r:sketchy"].state == "build"


def test_retrain_replaces_the_pin_and_keeps_the_old_result(trained: World) -> None:
    old = pinned(trained)
    trained.build(retrain=["r:sketchy"])
    step = trained.plan().steps["r:sketchy"]
    assert trained.trained == ["r:sketchy"]
    assert pinned(trained) != old
    assert old in [result.digest for result in trained.store.known(step.key).results]


def test_what_takes_a_retrained_result_waits_for_it(trained: World) -> None:
    plan = trained.plan(retrain=["r:sketchy"])
    assert plan.steps["r:inked"].artifact is None
    assert plan.steps["r:inked"].to_do


def test_two_pins_for_one_key_stop_the_plan(trained: World) -> None:
    double(trained)
    with pytest.raises(BrokenPromise) as caught:
        trained.plan()
    assert "the lock pins two results for the same inputs" in caught.value.message
    assert caught.value.exit_code == 3


def test_retrain_answers_two_pins(trained: World) -> None:
    double(trained)
    trained.build(retrain=["r:sketchy"])
    assert len(pinned(trained)) == 64


def double(world: World) -> None:
    """What a git merge of two trainings leaves."""
    ((_, pin),) = (item for pins in world.lock.results.values() for item in pins.items())
    world.lock.pin(type(pin)(**(pin.__dict__ | {"digest": "f" * 64})), replace=False)


def test_a_pin_of_other_settings_is_not_used(trained: World) -> None:
    trained.forget_results()
    trained.recipe(LORA.replace("steps = 10", "steps = 11") + BAKE)
    step = trained.plan().steps["r:sketchy"]
    assert step.pin is None
    assert step.reason == ""
