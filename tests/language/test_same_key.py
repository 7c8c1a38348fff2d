"""What may be written differently and means the same, and what may not."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.planner.conftest import World

RECIPE = """
[weighted_sum.soft]
checkpoints = ["flat", "ink"]
weights = [0.6, 0.4]
blocks = { "unet.mid" = [0.5, 0.5], vae = [1.0, 0.0] }

[lora.sketchy]
on = "soft"
dataset = "sketches"
steps = 10

[bake.inked]
checkpoint = "soft"
loras.glow = { strength = 0.8, blocks = { "unet.in0?" = 0.1 } }

[preset]
checkpoint = "inked"
bake = { sketchy = 0.5 }
export = ["loras", "checkpoint"]
"""


def keys(world: World, text: str) -> dict[str, str]:
    world.recipe(text)
    steps = world.plan().steps.values()
    return {step.node.target.name: step.key or step.content_key for step in steps}


def built_keys(world: World, text: str) -> dict[str, str]:
    """The keys of everything, with what waits for a training planned after it."""
    world.recipe(text)
    world.build()
    return {step.node.target.name: step.key for step in world.plan().steps.values()}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("weights = [0.6, 0.4]", "weights   =   [\n  0.6, # more of it\n  0.4,\n]  # two"),
        ("weights = [0.6, 0.4]", "weights = [6e-1, 0.40]"),
        ("steps = 10", "steps = 0x0a"),
        ("steps = 10", "steps = 1_0"),
        ("steps = 10", "steps = 10\nbatch = 4"),
        ("steps = 10", "steps = 10\nlearning_rate = 0.0001"),
        ("steps = 10", "steps = 10\nseed = 0"),
        ("steps = 10", "steps = 10\nnoise_from = 0\nalpha = -0.0"),
        ("strength = 0.8,", "strength = 0.80,"),
        ("[lora.sketchy]", "# a style\n\n\n[lora.sketchy] # learned"),
        ('dataset = "sketches"', "dataset = 'sketches'"),
        ('dataset = "sketches"', 'dataset = "\\u0073ketches"'),
        ('"soft"\ndataset = "sketches"\nsteps = 10', '"soft"\nsteps = 10\ndataset = "sketches"'),
        (
            'loras.glow = { strength = 0.8, blocks = { "unet.in0?" = 0.1 } }',
            'loras = { glow = { blocks = { "unet.in0?" = 0.1 }, strength = 0.8 } }',
        ),
        (
            'loras.glow = { strength = 0.8, blocks = { "unet.in0?" = 0.1 } }',
            '[bake.inked.loras.glow]\nstrength = 0.8\nblocks."unet.in0?" = 0.1',
        ),
        (
            'loras.glow = { strength = 0.8, blocks = { "unet.in0?" = 0.1 } }',
            'loras.glow.strength = 0.8\nloras.glow.blocks."unet.in0?" = 0.1',
        ),
        ("vae = [1.0, 0.0]", '"vae" = [1, 0]'),
        ('"unet.mid" = [0.5, 0.5], vae = [1.0, 0.0]', 'vae = [1.0, 0.0], "unet.mid" = [0.5, 0.5]'),
        ('export = ["loras", "checkpoint"]', 'export = ["checkpoint", "loras", "loras"]'),
    ],
)
def test_another_way_of_writing_is_the_same_action(world: World, old: str, new: str) -> None:
    assert old in RECIPE
    assert built_keys(world, RECIPE.replace(old, new)) == built_keys(world, RECIPE)


def test_a_description_changes_no_key(world: World) -> None:
    assert built_keys(world, 'description = "words"\n' + RECIPE) == built_keys(world, RECIPE)


def test_line_ends_of_windows_change_no_key(world: World) -> None:
    assert keys(world, RECIPE.replace("\n", "\r\n")) == keys(world, RECIPE)


def test_the_order_of_tables_changes_no_key(world: World) -> None:
    head, *tables = RECIPE.split("\n\n")
    assert built_keys(world, "\n\n".join(reversed([head, *tables]))) == built_keys(world, RECIPE)


def test_renaming_a_target_changes_no_key(world: World) -> None:
    before = built_keys(world, RECIPE)
    after = built_keys(world, RECIPE.replace("soft", "tender").replace("sketchy", "rough"))
    assert sorted(before.values()) == sorted(after.values())


def test_renaming_the_recipe_changes_no_key_but_the_titles(world: World) -> None:
    before = keys(world, RECIPE)
    world.recipe(RECIPE, "other")
    after = {step.node.target.name: step.key for step in world.plan("other:inked", "other:sketchy").steps.values()}
    assert {name: before[name] for name in after} == after


def test_renaming_a_source_changes_no_key(world: World) -> None:
    before = keys(world, RECIPE)
    world.artifacts["even"], world.tables["even"] = world.artifacts["flat"], {"from": "elsewhere"}
    assert keys(world, RECIPE.replace('"flat"', '"even"')) == before


def test_a_renamed_picture_changes_nothing(world: World) -> None:
    before = keys(world, RECIPE)
    notes = world.artifacts["sketches"].notes
    notes["names"] = {sha: [f"renamed-{name}" for name in names] for sha, names in notes["names"].items()}
    assert keys(world, RECIPE) == before


def test_another_block_name_for_the_same_block_is_the_same_tensor(world: World) -> None:
    """`M00` is how the merge programs write `unet.mid`: the settings differ, what is made does not."""
    text = '[weighted_sum.soft]\ncheckpoints = ["flat", "ink"]\nweights = [0.6, 0.4]\n'
    world.recipe(text + 'blocks = { "unet.mid" = [0.5, 0.5] }\n')
    one = world.plan().steps["r:soft"].artifact
    world.recipe(text + 'blocks = { "M00" = [0.5, 0.5] }\n')
    two = world.plan().steps["r:soft"].artifact
    assert one is not None
    assert two is not None
    assert one.identity == two.identity


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("weights = [0.6, 0.4]", "weights = [0.7, 0.3]", {"soft"}),
        ("steps = 10", "steps = 11", {"sketchy"}),
        ("steps = 10", "steps = 10\nseed = 1", {"sketchy"}),
        ("strength = 0.8", "strength = 0.9", {"inked"}),
        ('"flat", "ink"', '"ink", "flat"', {"soft"}),
        ('export = ["loras", "checkpoint"]', 'export = ["checkpoint"]', {"preset.export"}),
        ('export = ["loras"', 'title = "A title"\nexport = ["loras"', {"preset.export"}),
    ],
)
def test_a_setting_that_decides_the_result_is_another_action(
    world: World, old: str, new: str, changed: set[str]
) -> None:
    before, after = built_keys(world, RECIPE), built_keys(world, RECIPE.replace(old, new))
    assert changed <= {name for name in before if before[name] != after[name]}


def test_the_seed_of_the_recipe_concerns_only_what_is_random(world: World) -> None:
    before, after = keys(world, RECIPE), keys(world, "seed = 5\n" + RECIPE)
    assert {name for name in before if before[name] != after[name]} == {"sketchy"}


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(4)), st.lists(st.sampled_from(["", "# note", "   ", "\t"]), min_size=4, max_size=4))
def test_layout_and_order_change_no_key(world: World, order: list[int], fillers: list[str]) -> None:
    tables = RECIPE.strip().split("\n\n")
    text = "".join(f"{fillers[i]}\n{tables[i]}\n" for i in order)
    assert keys(world, text) == keys(world, RECIPE)
