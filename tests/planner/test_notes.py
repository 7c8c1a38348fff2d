"""What is only told of an artifact passes on to what is made of it, and changes no key."""

from __future__ import annotations

from tests.planner.conftest import World

TRAINED = """
[lora.sketchy]
on = "flat"
dataset = "drawn"
steps = 10
"""
MERGED = """
[lora_merge.both]
loras.glow = { strength = 0.5 }
loras.sketchy = { strength = 1.0 }
loras.neon = { strength = 0.5 }
"""


def words(world: World, target: str) -> list[str]:
    artifact = world.plan().steps[f"r:{target}"].artifact
    assert artifact is not None
    found: list[str] = artifact.notes["trigger"]
    return found


def test_a_merge_of_loras_has_the_words_of_all_of_them_each_once(world: World) -> None:
    world.lora("glow", "glow", "light")
    world.lora("neon", "neon", "light")
    world.pictures("drawn", {"e.png": "a <cat>"}, "<cat>")
    world.recipe(TRAINED + MERGED)
    world.build()
    assert words(world, "sketchy") == ["<cat>"]
    assert words(world, "both") == ["glow", "light", "<cat>", "neon"]


def test_a_smaller_copy_of_a_lora_has_its_words(world: World) -> None:
    world.lora("glow", "glow")
    world.recipe('[resize.small]\nlora = "glow"\nrank = 1')
    world.build()
    assert words(world, "small") == ["glow"]


def test_words_of_a_checkpoint_are_not_those_of_a_lora_that_is_trained_on_it(world: World) -> None:
    world.artifacts["flat"].notes["trigger"] = ["flat"]
    world.recipe(TRAINED.replace("drawn", "sketches"))
    world.build()
    assert words(world, "sketchy") == []


def test_words_enter_no_key(world: World) -> None:
    world.recipe(MERGED.replace("loras.sketchy = { strength = 1.0 }\n", "").replace("loras.neon", "loras.ink-lora"))
    keys = []
    for said in ("ink", "another word"):
        world.lora("ink-lora", said)
        keys.append(world.plan().steps["r:both"].key)
    assert keys[0] == keys[1]
