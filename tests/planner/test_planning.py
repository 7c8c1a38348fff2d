"""What a plan says of each target: states, and where results come from."""

from __future__ import annotations

import pytest

from sdforge.errors import BrokenPromise
from sdforge.fitting import Misfits
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
PRESET = """
[preset]
checkpoint = "soft"
bake = { sketchy = 0.8 }
"""


def test_what_was_never_made_is_built(world: World) -> None:
    world.recipe(SOFT)
    assert world.states() == {"soft": "build"}


def test_what_was_built_is_reused(world: World) -> None:
    world.recipe(SOFT + LORA + PRESET)
    world.build()
    assert set(world.states().values()) == {"reuse"}


def test_a_second_build_runs_nothing(world: World) -> None:
    world.recipe(SOFT + LORA)
    world.build()
    world.trained.clear()
    assert world.build().to_do == []
    assert world.trained == []


def test_a_training_behind_a_planned_merge_is_built_when_it_was_never_made(world: World) -> None:
    world.recipe(SOFT + LORA)
    assert world.states() == {"soft": "build", "sketchy": "build"}


def test_a_training_behind_a_changed_merge_may_have_to_run(world: World) -> None:
    world.recipe(SOFT + LORA)
    world.build()
    world.recipe(SOFT.replace("[0.6, 0.4]", "[0.7, 0.3]") + LORA)
    assert world.states() == {"soft": "build", "sketchy": "maybe"}


def test_a_fresh_clone_with_a_lock_also_says_maybe_behind_a_changed_merge(world: World) -> None:
    world.recipe(SOFT + LORA)
    world.build()
    world.forget_results()
    world.recipe(SOFT.replace("[0.6, 0.4]", "[0.7, 0.3]") + LORA)
    assert world.states()["sketchy"] == "maybe"


def test_a_training_with_another_setting_is_no_maybe(world: World) -> None:
    world.recipe(SOFT + LORA)
    world.build()
    world.recipe(SOFT.replace("[0.6, 0.4]", "[0.7, 0.3]") + LORA.replace("steps = 10", "steps = 11"))
    assert world.states()["sketchy"] == "build"


def test_an_intermediate_that_nobody_asks_for_is_unneeded(world: World) -> None:
    world.recipe(SOFT + LORA)
    world.build("r:sketchy", pin=False)
    world.forget_formulas()
    assert world.states("r:sketchy") == {"soft": "unneeded", "sketchy": "reuse"}


def test_an_intermediate_whose_bytes_are_gone_is_not_made_for_a_result_that_is_there(world: World) -> None:
    world.recipe(SOFT + LORA)
    world.build("r:sketchy")
    world.forget_bytes("soft")
    assert world.plan("r:sketchy").to_do == []


def test_a_target_that_is_wanted_itself_is_made_when_its_bytes_are_gone(world: World) -> None:
    world.recipe(SOFT)
    world.build()
    world.forget_bytes("soft")
    assert world.states() == {"soft": "build"}
    assert [cause.text for cause in world.why("soft")] == ["its bytes are needed, and are not in the store"]


def test_files_that_are_not_whole_are_restored_and_nothing_is_made(world: World) -> None:
    world.recipe(SOFT + '[preset]\ncheckpoint = "soft"\n')
    world.build()
    plan = world.plan(without=["r:preset.export"])
    export = plan.steps["r:preset.export"]
    assert (export.state, export.restore) == ("reuse", True)
    assert plan.to_do == [export]


def test_a_merge_of_one_base_with_itself_is_nothing_to_do(world: World) -> None:
    world.recipe('[weighted_sum.same]\ncheckpoints = ["flat", "flat"]\nweights = [0.5, 0.5]\n')
    plan = world.plan()
    assert plan.steps["r:same"].idle
    assert plan.to_do == []


def test_weight_one_passes_the_base_through(world: World) -> None:
    world.recipe('[weighted_sum.same]\ncheckpoints = ["flat", "ink"]\nweights = [1.0, 0.0]\n')
    step = world.plan().steps["r:same"]
    assert step.artifact is not None
    assert step.artifact.identity == world.artifacts["flat"].identity


def test_a_changed_block_leaves_every_other_component_its_identity(world: World) -> None:
    world.recipe(SOFT)
    before = world.plan().steps["r:soft"].artifact
    world.recipe(SOFT + 'blocks = { "unet.mid" = [0.5, 0.5] }\n')
    after = world.plan().steps["r:soft"].artifact
    assert before is not None
    assert after is not None
    changed = {n for n in before.components if before.components[n].identity != after.components[n].identity}
    assert changed == {"unet"}


def test_a_changed_block_leaves_every_other_tensor_its_identity(world: World) -> None:
    world.recipe(SOFT)
    plan = world.plan()
    before = {m.tensor.name: m.tensor.identity for m in world.formula(plan, "soft").components["unet"]}
    world.recipe(SOFT + 'blocks = { "unet.mid" = [0.5, 0.5] }\n')
    plan = world.plan()
    after = {m.tensor.name: m.tensor.identity for m in world.formula(plan, "soft").components["unet"]}
    assert {name for name in before if before[name] != after[name]} == {
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    }


def test_two_names_of_one_action_share_its_key(world: World) -> None:
    world.recipe(SOFT + SOFT.replace("soft", "tender"))
    plan = world.plan()
    assert plan.steps["r:soft"].key == plan.steps["r:tender"].key


def test_two_recipes_share_an_action(world: World) -> None:
    world.recipe(SOFT + LORA)
    world.recipe(SOFT.replace("soft", "tender") + LORA.replace("soft", "tender"), "other")
    world.build()
    assert set(world.states("other:sketchy", "other:tender").values()) == {"reuse"}


def test_a_target_of_another_recipe_is_planned_with_it(world: World) -> None:
    world.recipe(SOFT, "base")
    world.recipe(LORA.replace('"soft"', '"base:soft"'))
    assert world.states("r:sketchy") == {"soft": "build", "sketchy": "build"}


def test_a_bake_of_strength_zero_changes_nothing(world: World) -> None:
    world.recipe('[bake.none]\ncheckpoint = "flat"\nloras.glow = { strength = 0 }\n')
    assert world.plan().steps["r:none"].idle


def test_a_swap_runs_nothing_and_has_the_other_vae(world: World) -> None:
    world.recipe('[swap.both]\ncheckpoint = "flat"\nvae = "ink"\n')
    plan = world.plan()
    made = plan.steps["r:both"].artifact
    assert plan.to_do == []
    assert made is not None
    assert made.components["vae"] == world.artifacts["ink"].components["vae"]
    assert made.components["unet"] == world.artifacts["flat"].components["unet"]


def test_a_lora_does_not_depend_on_where_its_base_came_from(world: World) -> None:
    """A swap that gives back the same parts is the same checkpoint."""
    world.recipe('[swap.same]\ncheckpoint = "flat"\nvae = "flat"\n' + LORA.replace("soft", "same"))
    one = world.plan().steps["r:sketchy"].key
    world.recipe(LORA.replace("soft", "flat"))
    assert world.plan().steps["r:sketchy"].key == one


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[cast.x]\ncheckpoint = "glow"\ndtype = "fp16"\n', "`glow` is a lora, and a checkpoint belongs here"),
        ('[cast.x]\ncheckpoint = "faces"\ndtype = "fp16"\n', "`faces` is a dataset, and a checkpoint belongs here"),
        (
            '[bake.x]\ncheckpoint = "flat"\nloras.ink = {}\n',
            "`ink` is a checkpoint, and a lora belongs here",
        ),
        (
            LORA.replace("soft", "flat") + '[cast.x]\ncheckpoint = "sketchy"\ndtype = "fp16"\n',
            "`sketchy` is a lora, and a checkpoint belongs here",
        ),
    ],
)
def test_an_input_of_another_kind_is_refused(world: World, text: str, complaint: str) -> None:
    world.recipe(text)
    assert world.misfits() == [complaint]


def test_checkpoints_of_other_widths_do_not_fit(world: World) -> None:
    world.checkpoint("wide", width=16)
    world.recipe(SOFT.replace('"ink"', '"wide"'))
    assert world.misfits() == ["`wide` does not fit `flat`: its context is 16 wide, the other's 8"]


def test_all_that_does_not_fit_is_said_at_once(world: World) -> None:
    world.recipe('[cast.x]\ncheckpoint = "glow"\ndtype = "fp16"\n[cast.y]\ncheckpoint = "faces"\ndtype = "fp16"\n')
    assert len(world.misfits()) == 2


def test_planning_changes_nothing(world: World) -> None:
    world.recipe(SOFT + LORA + PRESET)
    before = (dict(world.store.keys), set(world.store.files), world.lock.dump())
    assert world.states() == world.states()
    assert (dict(world.store.keys), set(world.store.files), world.lock.dump()) == before


def test_two_pins_of_one_key_are_refused_and_named(world: World) -> None:
    world.recipe(SOFT + LORA)
    world.build()
    (key, pins), *_ = world.lock.results.items()
    (pin,) = pins.values()
    other = type(pin)(**(pin.__dict__ | {"digest": "f" * 64}))
    world.lock.pin(other, replace=False)
    with pytest.raises(
        BrokenPromise, match=f"{pin.digest[:12]}.*ffffffffffff|ffffffffffff.*{pin.digest[:12]}"
    ) as caught:
        world.plan()
    assert caught.value.hint == "`forge lock --take DIGEST` chooses one"
    assert key in world.lock.results


def test_every_block_pattern_that_means_nothing_is_named_at_its_place(world: World) -> None:
    world.recipe(
        '[weighted_sum.x]\ncheckpoints = ["flat", "ink"]\nweights = [0.5, 0.5]\n'
        'blocks = { "unet.zz" = [1, 0], "unet.in0?" = [1, 0], "unet.mid?" = [0, 1] }\n'
    )
    with pytest.raises(Misfits) as caught:
        world.plan()
    assert [(misfit.key, misfit.problem.code) for misfit in caught.value.found] == [
        ("unet.zz", "setting"),
        ("unet.mid?", "setting"),
    ]


def test_two_embeddings_of_one_word_are_refused_before_either_is_trained(world: World) -> None:
    word = 'on = "flat"\ndataset = "sketches"\ntoken = "<x>"\n'
    world.recipe(
        f"[textual_inversion.a]\n{word}[textual_inversion.b]\n{word}seed = 1\n"
        '[insert.both]\ncheckpoint = "flat"\nembeddings.a = {}\nembeddings.b = {}\n'
    )
    with pytest.raises(Misfits, match="`b` and `a` are both called '<x>'"):
        world.plan()


BAKED = '[bake.baked]\ncheckpoint = "soft"\nloras.sketchy = { strength = 0.8 }\n'


def test_a_merge_that_only_a_bake_takes_is_computed_within_it(world: World) -> None:
    """Also while the LoRA has still to be trained, on another base."""
    world.recipe(SOFT + LORA.replace('"soft"', '"flat"') + BAKED)
    plan = world.plan("r:baked")
    assert {step.node.target.name: step.state for step in plan.steps.values()} == {
        "soft": "unneeded",
        "sketchy": "build",
        "baked": "build",
    }
    assert plan.steps["r:soft"].within == "r:baked"
    world.build("r:baked")
    assert world.states("r:baked") == {"soft": "unneeded", "sketchy": "reuse", "baked": "reuse"}


def test_a_merge_that_a_training_reads_too_is_made(world: World) -> None:
    world.recipe(SOFT + LORA + BAKED)
    assert world.states("r:baked")["soft"] == "build"


def test_what_is_computed_within_another_gets_the_same_key_as_by_itself(world: World) -> None:
    world.recipe(SOFT + '[cast.wide]\ncheckpoint = "soft"\ndtype = "fp32"\n')
    keys = [{step.id: step.key for step in world.plan(*wanted).steps.values()} for wanted in (["r:wide"], [])]
    assert keys[0] == keys[1]
    assert world.plan("r:wide").steps["r:soft"].within == "r:wide"
    assert world.plan().steps["r:soft"].within == ""
