"""A training depends on its inputs' bytes: whatever makes the same bytes in another way retrains nothing."""

from __future__ import annotations

from sdforge.plan import Plan
from tests.planner.conftest import World

SOFT = """
[weighted_sum.soft]
checkpoints = ["flat", "ink"]
weights = [0.6, 0.4]
"""
LORA = """
[lora.sketchy]
on = "soft"
dataset = "sketches"
steps = 10
"""
OTHER = SOFT.replace("[0.6, 0.4]", "[0.7, 0.3]")


def same_bytes(world: World, old: Plan, text: str) -> None:
    """Let what `text` plans for `soft` come out with the bytes of the old plan's `soft`."""
    before = {m.tensor.name: m for t in world.formula(old, "soft").components.values() for m in t}
    world.recipe(text)
    new = world.plan()
    for table in world.formula(new, "soft").components.values():
        for made in table:
            world.bytes_of[made.tensor.identity] = before[made.tensor.name].tensor.identity


def test_another_merge_with_the_same_bytes_retrains_nothing(world: World) -> None:
    world.recipe(SOFT + LORA)
    same_bytes(world, world.build(), OTHER + LORA)
    assert world.states()["sketchy"] == "maybe"
    world.trained.clear()
    plan = world.build()
    assert world.trained == []
    assert plan.steps["r:sketchy"].state == "reuse"


def test_another_merge_with_other_bytes_retrains(world: World) -> None:
    world.recipe(SOFT + LORA)
    world.build()
    world.recipe(OTHER + LORA)
    world.trained.clear()
    world.build()
    assert world.trained == ["r:sketchy"]


def test_the_new_plan_key_is_an_alias_from_then_on(world: World) -> None:
    world.recipe(SOFT + LORA)
    same_bytes(world, world.build(), OTHER + LORA)
    world.build()
    world.forget_bytes("soft")
    plan = world.plan("r:sketchy")
    step = plan.steps["r:sketchy"]
    assert plan.aliases == []
    assert (step.state, step.key != step.content_key) == ("reuse", True)


def test_the_alias_is_found_in_the_lock_on_a_fresh_clone(world: World) -> None:
    world.recipe(SOFT + LORA)
    plan = world.build()
    step = plan.steps["r:sketchy"]
    assert step.content_key != step.key
    world.forget_results()
    found = world.plan().steps["r:sketchy"]
    assert found.content_key == step.content_key
    assert found.pin is not None


def test_a_training_is_named_by_the_bytes_of_a_merge_not_by_its_recipe(world: World) -> None:
    world.recipe(SOFT + LORA)
    one = world.build().steps["r:sketchy"]
    same_bytes(world, world.plan(), OTHER + LORA)
    two = world.build().steps["r:sketchy"]
    assert one.key != two.key
    assert one.content_key == two.content_key


def test_a_training_on_a_source_has_one_key(world: World) -> None:
    world.recipe(LORA.replace("soft", "flat"))
    step = world.build().steps["r:sketchy"]
    assert step.key == step.content_key
