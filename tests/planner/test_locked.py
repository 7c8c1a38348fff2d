"""What the lock says of a plan: what `--locked` refuses, what is written, and what a formula must come out as."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sdforge.errors import BrokenPromise
from sdforge.lock import Lock
from sdforge.lockfile import LockFile
from sdforge.plan import Plan
from tests.planner.conftest import World

RECIPE = """
[weighted_sum.soft]
checkpoints = ["flat", "ink"]
weights = [0.6, 0.4]

[lora.sketchy]
on = "soft"
dataset = "sketches"
steps = 10
"""


def lock_file(world: World, *, locked: bool = True) -> LockFile:
    store = SimpleNamespace(
        preimage=world.store.preimage, record=lambda _: {}, known=world.store.known, table=world.store.table
    )
    session: Any = SimpleNamespace(lock=world.lock, graph=world.graph, store=store, locked=locked, retrain=set())
    return LockFile(session)


def write(world: World, plan: Plan) -> Lock:
    """Enter what a finished plan changes, as a build does."""
    changes = lock_file(world).changes(plan)
    world.lock.sources |= changes.sources
    world.lock.targets |= changes.targets
    for pins in changes.results.values():
        for pin in pins.values():
            world.lock.pin(pin, replace=False)
    return changes


@pytest.fixture
def settled(world: World) -> World:
    """Everything built, and the lock written."""
    world.recipe(RECIPE)
    write(world, world.build())
    return world


def refused(world: World) -> list[str]:
    return lock_file(world).differences(world.plan())


def test_what_the_lock_holds_passes(settled: World) -> None:
    lock_file(settled).check(settled.plan())


def test_a_settled_lock_does_not_change(settled: World) -> None:
    changes = lock_file(settled).changes(settled.plan())
    assert (changes.sources, changes.targets, changes.results) == ({}, {}, {})


def test_every_source_target_and_result_is_in_the_lock(settled: World) -> None:
    assert settled.lock.sources.keys() == {"flat", "ink", "sketches"}
    assert settled.lock.targets.keys() == {"r:soft", "r:sketchy"}
    assert len(settled.lock.results) == 1


def test_a_target_is_written_with_its_key_and_digest(settled: World) -> None:
    step = settled.plan().steps["r:sketchy"]
    assert step.result is not None
    assert settled.lock.targets["r:sketchy"] == {"key": step.content_key, "digest": step.result.digest}
    merged = settled.plan().steps["r:soft"].artifact
    assert merged is not None
    begin = {name: component.content[:16] for name, component in merged.components.items()}
    assert settled.lock.targets["r:soft"]["components"] == begin


def test_an_empty_lock_is_refused_with_all_that_is_missing(world: World) -> None:
    world.recipe(RECIPE)
    plan = world.plan()
    with pytest.raises(BrokenPromise) as caught:
        lock_file(world).check(plan)
    assert caught.value.message.splitlines() == [
        "the lock does not hold what is asked for:",
        "  source flat is not in the lock",
        "  source ink is not in the lock",
        "  source sketches is not in the lock",
        "  r:soft is not in the lock",
        "  r:sketchy is not in the lock, or what it is made from has changed",
    ]


def test_without_locked_nothing_is_refused(world: World) -> None:
    world.recipe(RECIPE)
    lock_file(world, locked=False).check(world.plan())


def test_a_changed_source_is_refused_and_named(settled: World) -> None:
    settled.checkpoint("ink", unet="other")
    assert refused(settled)[0].startswith("source ink is not the one that is pinned (")


def test_a_changed_formula_is_refused_and_named(settled: World) -> None:
    settled.recipe(RECIPE.replace("[0.6, 0.4]", "[0.7, 0.3]"))
    assert "r:soft has changed since the lock was written" in refused(settled)


def test_a_changed_training_is_refused_and_named(settled: World) -> None:
    settled.recipe(RECIPE.replace("steps = 10", "steps = 11"))
    assert refused(settled) == ["r:sketchy is not in the lock"]


def test_a_pinned_result_that_is_nowhere_is_refused_and_named(settled: World) -> None:
    ((digest, _),) = (item for pins in settled.lock.results.values() for item in pins.items())
    settled.forget_results()
    assert refused(settled) == [f"r:sketchy: the pinned result {digest[:12]} is not to be had"]


def test_another_result_than_the_pinned_one_is_refused(settled: World) -> None:
    ((digest, _),) = (item for pins in settled.lock.results.values() for item in pins.items())
    settled.forget_results()
    settled.build(salt="elsewhere", pin=False)
    assert refused(settled) == [f"r:sketchy: the pinned result {digest[:12]} is not to be had, only another one"]


def test_another_result_than_the_pinned_one_leaves_the_lock_alone(settled: World) -> None:
    settled.recipe(RECIPE + '[bake.inked]\ncheckpoint = "soft"\nloras.sketchy = {}\n')
    write(settled, settled.build())
    before = settled.lock.dump()
    settled.forget_results()
    write(settled, settled.build(salt="elsewhere", pin=False))
    assert settled.lock.dump() == before


def test_a_result_that_is_used_and_not_pinned_is_pinned(settled: World) -> None:
    pins = dict(settled.lock.results)
    settled.lock.results.clear()
    settled.lock.pin(next(iter(next(iter(pins.values())).values())), replace=True)
    settled.lock.results.clear()
    changes = lock_file(settled).changes(settled.plan())
    assert changes.results.keys() == pins.keys()


def test_a_new_way_to_the_same_result_is_added_to_its_pin(settled: World) -> None:
    ((key, pins),) = settled.lock.results.items()
    (pin,) = pins.values()
    pin.plans = []
    settled.lock.pin(pin, replace=True)
    step = settled.plan().steps["r:sketchy"]
    changes = lock_file(settled).changes(settled.plan())
    assert changes.results[key][pin.digest].plans == [step.key]


def test_a_formula_that_comes_out_as_the_lock_says_passes(settled: World) -> None:
    step = settled.plan().steps["r:soft"]
    assert step.result is not None
    lock_file(settled).compare(step, step.result.components)


def test_a_formula_that_comes_out_differently_for_the_same_inputs_is_refused(settled: World) -> None:
    step = settled.plan().steps["r:soft"]
    assert step.result is not None
    wrong = {name: c._replace(content="0" * 64) for name, c in step.result.components.items()}
    with pytest.raises(BrokenPromise) as caught:
        lock_file(settled).compare(step, wrong)
    said = settled.lock.targets["r:soft"]["digest"][:12]
    assert f"and the lock says {said} for the same inputs" in caught.value.message
    assert caught.value.exit_code == 3


def test_what_came_out_differently_is_named_down_to_its_tensor(settled: World) -> None:
    """Of a fresh clone the lock alone tells the component; here the store still lists what was there before."""
    step = settled.plan().steps["r:soft"]
    assert step.result is not None
    before = step.result.components["unet"]
    same = settled.store.component((t.name, t.identity, t.name) for t in settled.store.table(before))
    first, *rest = settled.store.table(before)
    rows = [(first.name, first.identity, "other bytes"), *((t.name, t.identity, t.name) for t in rest)]
    other = settled.store.component(rows)
    settled.lock.targets["r:soft"]["components"]["unet"] = same.content[:16]
    with pytest.raises(BrokenPromise, match=r"for the same inputs: unet$"):
        lock_file(settled).compare(step, step.result.components | {"unet": other})
    step.result.components["unet"] = same
    with pytest.raises(BrokenPromise) as caught:
        lock_file(settled).compare(step, step.result.components | {"unet": other})
    assert caught.value.message.endswith(f": unet ({first.name} is the first of 1 tensor)")


def test_a_formula_of_other_inputs_is_compared_with_nothing(settled: World) -> None:
    settled.recipe(RECIPE.replace("[0.6, 0.4]", "[0.7, 0.3]"))
    step = settled.plan().steps["r:soft"]
    assert step.artifact is not None
    wrong = {name: c._replace(content="0" * 64) for name, c in step.artifact.components.items()}
    lock_file(settled).compare(step, wrong)


def test_pictures_are_not_pinned(world: World) -> None:
    world.recipe('[preset]\ncheckpoint = "flat"\n[preset.previews]\nprompts = ["a"]\n')
    write(world, world.build())
    assert world.lock.targets.keys() == {"r:preset.export"}
    assert world.lock.results == {}
