"""What `[preset]` becomes: targets of its own, each name in the role of its kind."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sdforge.method import method, method_groups
from sdforge.recipe import Recipe, read_recipe

BEFORE = """\
family = "sd15"

[source.photo]
from = "cat.png"

[textual_inversion.word]
on = "flat"
dataset = "sketches"
token = "<word>"

[lora.style]
on = "flat"
dataset = "sketches"

[clip_inversion.look]
on = "flat"
dataset = "sketches"

[aesthetic_gradient.mood]
on = "flat"
dataset = "sketches"
clip = "photo"
prompts = ["a drawing"]

[null_text_inversion.cat]
on = "flat"
image = "photo"
prompt = "a cat"

[preset]
checkpoint = "flat"
"""
KINDS = {role.kind: name for name, role in method("bake").signature.roles.items() if role.many == "table"}
TRAININGS = sorted(name for name, group in method_groups().items() if group == "trainings")


def expanded(preset: str) -> Recipe:
    return read_recipe((BEFORE + preset).encode(), "r", "recipes/r.toml")


def used(recipe: Recipe, target: str) -> dict[str, list[str]]:
    """Role → names, of a target that the preset became."""
    found: dict[str, list[str]] = {}
    for use in recipe.targets[f"preset.{target}"].uses:
        found.setdefault(use.role, []).append(use.reference)
    return found


def test_what_is_baked_goes_where_its_kind_belongs() -> None:
    recipe = expanded("bake = { style = 0.8, look = 1.0 }\n")
    assert used(recipe, "bake") == {"checkpoint": ["flat"], "loras": ["style"], "image_embeddings": ["look"]}
    assert {use.reference: use.use["strength"] for use in recipe.targets["preset.bake"].uses if use.use} == {
        "style": 0.8,
        "look": 1.0,
    }


def test_the_order_is_insert_bake_steer_cast() -> None:
    recipe = expanded('insert = ["word"]\nbake = { mood = 0.5, style = 0.8 }\ndtype = "fp16"\n')
    assert used(recipe, "insert") == {"checkpoint": ["flat"], "embeddings": ["word"]}
    assert used(recipe, "bake") == {"checkpoint": ["preset.insert"], "loras": ["style"]}
    assert used(recipe, "steer") == {"checkpoint": ["preset.bake"], "aesthetics": ["mood"]}
    assert used(recipe, "cast") == {"checkpoint": ["preset.steer"]}
    dtypes = {name: json.loads(recipe.targets[f"preset.{name}"].settings)["dtype"] for name in ("bake", "steer")}
    assert dtypes == {"bake": "", "steer": "fp16"}  # rounded once


def test_what_is_steered_alone_is_one_step() -> None:
    recipe = expanded("bake = { mood = 0.5 }\n")
    assert "preset.bake" not in recipe.targets
    assert used(recipe, "export")["checkpoint"] == ["preset.steer"]


def test_sidecars_reach_export_and_previews() -> None:
    recipe = expanded('sidecars = ["cat", "look"]\n\n[preset.previews]\nprompts = ["a cat"]\n')
    for target in ("export", "previews"):
        assert used(recipe, target)["sidecars"] == ["cat", "look"]


def test_what_is_baked_or_inserted_is_exported_by_its_kind() -> None:
    recipe = expanded('insert = ["word"]\nbake = { mood = 0.5, style = 0.8, look = 1.0 }\n')
    found = used(recipe, "export")
    del found["checkpoint"]
    assert found == {
        "embeddings": ["word"],
        "loras": ["style"],
        "image_embeddings": ["look"],
        "aesthetics": ["mood"],
    }


def test_what_was_baked_before_the_preset_is_exported_too() -> None:
    recipe = read_recipe(
        (BEFORE.replace('checkpoint = "flat"\n', 'checkpoint = "inked"\n') + BAKE).encode(), "r", "recipes/r.toml"
    )
    found = used(recipe, "export")
    assert (found["loras"], found["image_embeddings"]) == (["style"], ["look"])


BAKE = """
[bake.inked]
checkpoint = "flat"
loras.style = { strength = 0.5 }
image_embeddings.look = {}
"""


@pytest.mark.parametrize("name", TRAININGS)
def test_a_preset_has_a_way_in_for_whatever_a_training_makes(name: str) -> None:
    """By `checkpoint`, `insert`, `bake` or `sidecars`; pictures are for other trainings."""
    from sdforge.graph import PRESET

    makes = method(name).makes
    if makes == "dataset":
        return
    assert makes in PRESET
    if "bake" in PRESET[makes]:
        assert makes in KINDS


def test_names_of_other_recipes_and_sources_are_loras_until_told_otherwise() -> None:
    found: Any = used(expanded('bake = { "other:style" = 0.5, photo = 1.0 }\n'), "bake")
    assert found["loras"] == ["other:style", "photo"]
