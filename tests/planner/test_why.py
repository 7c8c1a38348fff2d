"""`why` is the difference of two manifests: old and new value, file and line."""

from __future__ import annotations

import pytest

from sdforge.commands import _causes_json, _tell_causes
from sdforge.explain import Cause, in_short
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


def lines(causes: list[Cause], depth: int = 0) -> list[str]:
    """Causes as `forge why` indents them, with their places."""
    found = []
    for cause in causes:
        place = f" @{cause.place.file}:{cause.place.line}" if cause.place else ""
        found += ["  " * depth + cause.text + place, *lines(cause.behind, depth + 1)]
    return found


def test_what_was_never_made_says_so(world: World) -> None:
    world.recipe(SOFT)
    assert lines(world.why("soft")) == ["it has never been made here"]


def test_what_is_reused_has_no_reason(world: World) -> None:
    world.recipe(SOFT + LORA)
    world.build()
    assert world.why("sketchy") == []


def test_a_changed_setting_is_named_with_both_values_and_its_line(world: World) -> None:
    world.recipe(SOFT + LORA)
    world.build()
    world.recipe(SOFT + LORA.replace("steps = 10", "steps = 12"))
    assert lines(world.why("sketchy")) == ["steps 10 → 12 @recipes/r.toml:10"]


def test_a_changed_list_is_named_whole(world: World) -> None:
    world.recipe(SOFT)
    world.build()
    world.recipe(SOFT.replace("[0.6, 0.4]", "[0.7, 0.3]"))
    assert lines(world.why("soft")) == ["weights [0.6, 0.4] → [0.7, 0.3] @recipes/r.toml:5"]


def test_a_changed_block_is_named_at_its_place(world: World) -> None:
    world.recipe(SOFT)
    world.build()
    world.recipe(SOFT + 'blocks = { "unet.mid" = [0.5, 0.5] }\n')
    assert lines(world.why("soft")) == ["blocks.unet.mid nothing → [0.5, 0.5] @recipes/r.toml:6"]


def test_a_setting_that_was_taken_out_points_at_its_table(world: World) -> None:
    world.recipe(SOFT + LORA)
    world.build()
    world.recipe(SOFT + LORA.replace("steps = 10\n", ""))
    assert lines(world.why("sketchy")) == ["steps 10 → 1000 @recipes/r.toml:7"]


def test_a_changed_seed_of_the_recipe_is_named(world: World) -> None:
    world.recipe(SOFT + LORA)
    world.build()
    world.recipe("seed = 7\n" + SOFT + LORA)
    assert [cause.text for cause in world.why("sketchy")] == ["seed 0 → 7"]


def test_a_changed_input_is_followed_to_what_changed_it(world: World) -> None:
    world.recipe(SOFT + LORA)
    world.build()
    world.recipe(SOFT.replace("[0.6, 0.4]", "[0.7, 0.3]") + LORA)
    assert lines(world.why("sketchy")) == [
        "`soft` changed: text_encoder, unet",
        "  weights [0.6, 0.4] → [0.7, 0.3] @recipes/r.toml:5",
    ]


def test_a_changed_source_is_named_with_its_part(world: World) -> None:
    world.recipe(SOFT)
    world.build()
    world.checkpoint("ink", unet="other")
    assert lines(world.why("soft")) == ["source `ink` changed"]


def test_a_changed_source_of_one_role_names_the_component(world: World) -> None:
    world.recipe(LORA.replace("soft", "ink"))
    world.build()
    world.checkpoint("ink", unet="other")
    assert lines(world.why("sketchy")) == ["source `ink` changed: unet"]


def test_new_lost_and_recaptioned_pictures_are_listed(world: World) -> None:
    world.recipe(LORA.replace("soft", "flat"))
    world.build()
    world.pictures("sketches", {"b.png": "a big dog", "c.png": "a hen"})
    assert lines(world.why("sketchy")) == [
        "data set `sketches` changed",
        "  + c.png",
        "  - a.png",
        '  ~ b.png: "a dog" → "a big dog"',
    ]


def test_a_changed_strength_is_named_with_its_lora(world: World) -> None:
    text = '[bake.inked]\ncheckpoint = "flat"\nloras.glow = { strength = 0.5 }\n'
    world.recipe(text)
    world.build()
    world.recipe(text.replace("0.5", "0.7"))
    assert lines(world.why("inked")) == ["source `glow` changed: strength 0.5 → 0.7 @recipes/r.toml:4"]


def test_the_order_of_inputs_is_a_reason(world: World) -> None:
    world.recipe(SOFT)
    world.build()
    world.recipe(SOFT.replace('"flat", "ink"', '"ink", "flat"'))
    assert lines(world.why("soft")) == ["checkpoints: their order"]


def test_another_number_of_inputs_is_a_reason(world: World) -> None:
    world.checkpoint("third")
    world.recipe(SOFT)
    world.build()
    world.recipe(SOFT.replace('"flat", "ink"', '"flat", "ink", "third"').replace("[0.6, 0.4]", "[0.6, 0.3, 0.1]"))
    texts = [cause.text for cause in world.why("soft")]
    assert "weights [0.6, 0.4] → [0.6, 0.3, 0.1]" in texts


def test_retrain_is_a_reason_of_its_own(world: World) -> None:
    world.recipe(SOFT + LORA)
    world.build()
    assert lines(world.why("sketchy", retrain=["r:sketchy"])) == ["it was asked for (--retrain)"]


def test_what_waits_for_another_target_says_for_which_and_why(world: World) -> None:
    world.recipe(LORA.replace("soft", "flat") + '[bake.inked]\ncheckpoint = "flat"\nloras.sketchy = {}\n')
    assert lines(world.why("inked")) == ["`sketchy` is made first", "  it has never been made here"]


def test_a_changed_strength_is_named_where_it_stands(world: World) -> None:
    baked = LORA.replace("soft", "flat") + '[bake.inked]\ncheckpoint = "flat"\nloras.sketchy = { strength = 0.5 }\n'
    world.recipe(baked + '[preset]\ncheckpoint = "inked"\ndtype = "fp16"\n')
    world.build()
    world.recipe(baked.replace("0.5", "0.8") + '[preset]\ncheckpoint = "inked"\ndtype = "fp16"\n')
    changed = "`sketchy` changed: strength 0.5 → 0.8 @recipes/r.toml:9"
    assert lines(world.why("inked")) == [changed]
    files = lines(world.why("preset.export"))
    assert files[0].startswith("`inked` changed"), "not `preset.cast`, which changes nothing and stands in no plan"
    assert files[1:] == [f"  {changed}"]


def test_a_fresh_clone_explains_from_the_lock(world: World) -> None:
    world.recipe(LORA.replace("soft", "flat"))
    plan = world.build()
    world.lock.targets["r:sketchy"] = {"key": plan.steps["r:sketchy"].key}
    world.forget_results()
    world.recipe(LORA.replace("soft", "flat").replace("steps = 10", "steps = 12"))
    assert lines(world.why("sketchy")) == ["steps 10 → 12 @recipes/r.toml:6"]


def test_a_fresh_clone_with_an_old_lock_names_no_code_that_the_lock_does_not_hold(world: World) -> None:
    world.recipe(LORA.replace("soft", "flat"))
    plan = world.build()
    world.lock.targets["r:sketchy"] = {"key": plan.steps["r:sketchy"].key}
    world.forget_results()
    world.recipe(LORA.replace("soft", "flat").replace("steps = 10", "steps = 12"))
    assert not any("loop" in cause.text or "family" in cause.text for cause in world.why("sketchy"))


def test_a_reason_in_short_has_at_most_three_parts() -> None:
    assert in_short([Cause("a"), Cause("b"), Cause("c"), Cause("d")]) == "a; b; c; …"
    assert in_short([Cause("a", None, [Cause("b")])]) == "a (b)"


def test_what_lies_behind_many_targets_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    behind = [Cause("weights 0.5 → 0.6")]
    for i in range(30):  # each takes the one before twice: there are 2³⁰ ways through them
        behind = [Cause(f"`x{i}` changed", None, behind), Cause(f"`x{i}` changed", None, behind)]
    _tell_causes(behind, set())
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "  `x29` changed"
    assert said[-1] == "  `x29` changed (as above)"
    assert [line.strip() for line in said].count("weights 0.5 → 0.6") == 1
    first, second = _causes_json(behind, set())
    assert second == {"text": "`x29` changed", "behind": [], "above": True}
    assert first["behind"][0]["behind"], "the first time it is told whole"
