"""Variants and sweeps as names: what they mean, what they share with their recipe, and that nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sdforge.recipe import Recipe, read_recipe
from sdforge.variants import MOST_CELLS
from tests.language.conftest import Said

RECIPE = """\
family = "sd15"

[weighted_sum.soft]
checkpoints = ["flat", "ink"]
weights = [0.6, 0.4]

[cast.small]
checkpoint = "soft"
dtype = "fp16"

[bake.inked]
checkpoint = "small"
loras.sketchy = { strength = 0.8, unet = 0.5 }

[preset]
checkpoint = "inked"

[preset.previews]
prompts = ["a cat"]
"""
VARIED = """
[variant.strong]
inked.loras.sketchy.strength = 1.0
[variant.mid]
soft.blocks."unet.mid" = [0.5, 0.5]
[variant.same]
inked.loras.sketchy.strength = 0.8
[sweep.pastel]
inked.loras.sketchy.strength = [0.4, 0.8]
soft.weights = [[0.6, 0.4], [0.5, 0.5], [0.0, 1.0]]
"""
OWN = {"preset.export", "preset.previews"}


def read(name: str = "r") -> Recipe:
    return read_recipe((RECIPE + VARIED).encode(), name, "recipes/r.toml")


def test_a_variant_sets_what_it_names_and_leaves_what_stands_beside_it() -> None:
    assert read("r@strong").targets["inked"].uses[1].use == {"strength": 1.0, "unet": 0.5, "blocks": {}}
    assert json.loads(read("r@mid").targets["soft"].settings)["blocks"] == {"unet.mid": [0.5, 0.5]}
    assert json.loads(read("r@mid").targets["soft"].settings)["weights"] == [0.6, 0.4]


def test_the_plain_recipe_is_what_it_is_without_variants() -> None:
    alone = read_recipe(RECIPE.encode(), "r", "recipes/r.toml")
    assert read().targets == alone.targets


@pytest.mark.parametrize(
    ("name", "own"),
    [("strong", {"inked"}), ("mid", {"soft", "small", "inked"}), ("same", set())],
)
def test_targets_behind_which_nothing_changes_are_the_plain_recipes(name: str, own: set[str]) -> None:
    recipe = read(f"r@{name}")
    assert recipe.targets.keys() - recipe.shared.keys() == own | OWN
    assert set(recipe.shared.values()) <= {"r"}


def test_cells_share_along_both_axes() -> None:
    """Cell 4 is the second of the second row: its sum is made for cell 3, the first of that row."""
    recipe = read("r@pastel-4")
    assert (recipe.id("soft"), recipe.id("small"), recipe.id("inked")) == (
        "r@pastel-3:soft",
        "r@pastel-3:small",
        "r@pastel-4:inked",
    )
    assert read("r@pastel-1").id("soft") == "r:soft"


def test_the_cell_that_is_as_the_recipe_says_knows_it() -> None:
    assert [name for name in read().variants if read(f"r@{name}").equal] == ["same", "pastel-2"]


def test_what_was_read_survives_the_cache_of_what_was_read() -> None:
    for name in ("r", "r@mid", "r@pastel-4"):
        assert Recipe.load(read(name).dump()) == read(name)


def test_a_sweep_stands_for_its_cells_row_by_row(root: Path, check: Callable[[str], Said]) -> None:
    from sdforge.session import open_session

    check(RECIPE + VARIED)
    project = open_session(root).project
    assert project.variants("r@pastel") == [f"r@pastel-{i}" for i in range(1, 7)]
    assert project.recipe("r").variants["pastel-2"] == {
        ("inked", "loras", "sketchy", "strength"): 0.8,
        ("soft", "weights"): [0.6, 0.4],
    }


def test_a_variant_that_is_not_there_is_guessed_at(forge: Callable[..., Said], check: Callable[[str], Said]) -> None:
    check(RECIPE + VARIED)
    said = forge("plan", "r@strnog")
    assert (said.code, said.err) == (2, "error: recipe 'r' has no variant 'strnog'\nhint: did you mean 'r@strong'?\n")


def test_names_of_commands_hold_variants_and_sweeps(forge: Callable[..., Said], check: Callable[[str], Said]) -> None:
    check(RECIPE + VARIED)
    names = forge("list", "--names").out.split()
    assert {"r@strong", "r@pastel", "r@pastel-6"} <= set(names)


def test_too_many_cells_are_refused(check: Callable[[str], Said]) -> None:
    said = check(RECIPE + f"[sweep.many]\ninked.loras.sketchy.strength = {list(range(MOST_CELLS + 1))}\n")
    assert f"`many` has {MOST_CELLS + 1} cells; the most is {MOST_CELLS}" in said.err


def test_a_cell_of_a_grid_is_printed_as_a_variant_that_can_be_added(
    root: Path, forge: Callable[..., Said], check: Callable[[str], Said]
) -> None:
    check(RECIPE)
    said = forge(
        "grid", "r", "--x", "inked.loras.sketchy.strength=0.4,0.6", "--y", "soft.weights=[1,0],[0,1]", "--cell", "2,1"
    )
    assert said.out == "\n[variant.picked]\ninked.loras.sketchy.strength = 0.6\nsoft.weights = [1, 0]\n"
    with (root / "recipes" / "r.toml").open("a") as file:
        file.write(said.out)
    again = read_recipe((root / "recipes" / "r.toml").read_bytes(), "r@picked", "recipes/r.toml")
    assert json.loads(again.targets["soft"].settings)["weights"] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("inked.loras.sketchy.strenth=1.0", "--x:1:1: error[unknown-setting]: `loras.sketchy.strenth`"),
        ("inked.loras.sketchy.strength=1.0,true", "--x:1:37: error[setting]: `loras.sketchy.strength` is a number"),
        ("preset.dtype=fp16", "error: --x 'preset.dtype=fp16' is no setting and its values"),
        ("preset.dtype", "error: --x 'preset.dtype' is no setting and its values"),
    ],
)
def test_a_mistake_in_a_flag_is_said_of_the_flag(
    flag: str, words: str, forge: Callable[..., Said], check: Callable[[str], Said]
) -> None:
    check(RECIPE)
    said = forge("grid", "r", "--x", flag)
    assert (said.code, said.err.startswith(words)) == (2, True), said.err
