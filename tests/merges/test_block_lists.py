"""Lists of block weights: what their places mean, the presets as they were published, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from sdforge.blocks import CURVES, LoraPreset, Preset, lora_preset, of_whole_unet, preset, spelled_out
from sdforge.edits.bake.update import Strengths
from sdforge.errors import SettingErrors
from sdforge.families import Family, Name
from tests.families.workbench import SD15, Taken
from tests.merges.test_merge_plan import BLOCK, planned, share
from tests.planner.conftest import World

PUBLISHED = (Path(__file__).parent / "presets.txt").read_text().splitlines()
COUNTED = [float(i) for i in range(26)]  # BASE 0, IN00 1, … M00 13, OUT00 14 … OUT11 25


class Fewer(Family):
    """SDXL as lists see it: nine blocks on each side, attention in the deeper ones, two text encoders."""

    title = "Stable Diffusion XL"
    networks = ("unet", "text_encoder", "text_encoder_2", "vae")

    def names(self) -> tuple[Name, ...]:
        blocks = ["time", "label", *(f"in{i:02}" for i in range(9)), "mid", *(f"out{i:02}" for i in range(9)), "out"]
        attended = ["in04", "in05", "in07", "in08", "mid", *(f"out{i:02}" for i in range(6))]
        found = [Name("unet", f"{block}.resnets.weight", block, block) for block in blocks]
        found += [Name("unet", f"{block}.attentions.weight", block, block) for block in attended]
        return (*found, *(Name(part, "weight", part) for part in self.networks[1:]))


Fewer.__abstractmethods__ = frozenset()
SDXL = Fewer()  # type: ignore[abstract]


def by_name(places: dict[tuple[str, str], float]) -> dict[str, float]:
    return {".".join(filter(None, place)): value for place, value in places.items()}


def listed(name: str) -> list[float]:
    """A preset as a list of 26, for comparison with the published ones."""
    found = by_name(preset(name, SD15))
    blocks = [*(f"in{i:02}" for i in range(12)), "mid", *(f"out{i:02}" for i in range(12))]
    return [found["text_encoder"], *(found[f"unet.{block}"] for block in blocks)]


# -- places ------------------------------------------------------------------------------------------------------------


def test_a_list_of_26_names_base_and_every_block() -> None:
    found = by_name(spelled_out(COUNTED, SD15))
    assert (found["text_encoder"], found["unet.in00"], found["unet.in11"], found["unet.mid"]) == (0, 1, 12, 13)
    assert (found["unet.out00"], found["unet.out11"]) == (14, 25)
    assert len(found) == 26


def test_a_list_of_25_says_nothing_of_text_encoders() -> None:
    assert by_name(spelled_out(COUNTED[1:], SD15)) == {
        name: value for name, value in by_name(spelled_out(COUNTED, SD15)).items() if name != "text_encoder"
    }


def test_a_list_of_17_names_the_blocks_with_attention_and_no_other() -> None:
    found = by_name(spelled_out(COUNTED[:17], SD15))
    order = [*(f"in{i:02}" for i in (1, 2, 4, 5, 7, 8)), "mid", *(f"out{i:02}" for i in range(3, 12))]
    assert [found[f"unet.{block}"] for block in order] == COUNTED[1:17]
    assert {name for name, value in found.items() if not value} == {
        "text_encoder",
        *(f"unet.in{i:02}" for i in (0, 3, 6, 9, 10, 11)),
        *(f"unet.out{i:02}" for i in range(3)),
    }


@pytest.mark.parametrize("count", [20, 19, 12])
def test_a_family_with_fewer_blocks_has_shorter_lists(count: int) -> None:
    found = by_name(spelled_out(COUNTED[:count], SDXL))
    if count == 19:
        assert "text_encoder" not in found
    else:
        assert found.pop("text_encoder") == found.pop("text_encoder_2") == 0
    deep = ["in04", "in05", "in07", "in08", "mid", *(f"out{i:02}" for i in range(6))]
    order = deep if count == 12 else [*(f"in{i:02}" for i in range(9)), "mid", *(f"out{i:02}" for i in range(9))]
    first = 0 if count == 19 else 1
    assert [found[f"unet.{block}"] for block in order] == COUNTED[first:count]
    assert len(found) == 19


def test_what_no_list_names_goes_with_the_first_and_the_last_block() -> None:
    found = by_name(of_whole_unet(spelled_out(COUNTED[:20], SDXL), SDXL))
    assert (found["unet.time"], found["unet.label"], found["unet.out"]) == (1, 1, 19)
    assert "unet.label" not in by_name(of_whole_unet(spelled_out(COUNTED, SD15), SD15))


@pytest.mark.parametrize(("family", "counts"), [(SD15, (1, 12, 19, 20, 21, 24, 27)), (SDXL, (17, 21, 25, 26))])
def test_a_list_of_another_length_is_refused_with_the_right_ones(family: Family, counts: tuple[int, ...]) -> None:
    for count in counts:
        with pytest.raises(SettingErrors) as caught:
            spelled_out([0.5] * count, family)
        ((key, message, hint),) = caught.value.found
        assert key == "mbw"
        assert message == f"a list of {count} block weights means nothing in {family.title}"
        assert hint.startswith(
            "26: BASE, IN00 … M00 … OUT11; 25: " if family is SD15 else "20: BASE, IN00 … M00 … OUT08; 19: "
        )


# -- presets -----------------------------------------------------------------------------------------------------------


def test_every_preset_that_can_be_written_is_a_curve() -> None:
    assert set(get_args(Preset)) == {"", *CURVES}
    assert all(lora_preset(name, SD15) for name in get_args(LoraPreset) if name)


@pytest.mark.parametrize("line", PUBLISHED)
def test_presets_are_those_that_merge_programs_publish(line: str) -> None:
    name, _, numbers = line.partition(": ")
    assert listed(name) == pytest.approx([float(number) for number in numbers.split()], abs=6e-11)


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("2SMOOTHSTEP", "SMOOTHSTEP*2"),
        ("4R_SMOOTHSTEP", "R_SMOOTHSTEP*4"),
        ("HALF_SMOOTHSTEP", "SMOOTHSTEP/2"),
        ("ONE_THIRD_R_SMOOTHSTEP", "R_SMOOTHSTEP/3"),
        ("ONE_FOURTH_SMOOTHSTEP", "SMOOTHSTEP/4"),
    ],
)
def test_a_preset_may_be_called_as_meh_calls_it(name: str, same: str) -> None:
    assert preset(name, SD15) == preset(same, SD15)


def test_t40_two_presets_at_two_places() -> None:
    assert listed("SMOOTHSTEP")[7] == 0.15625
    assert listed("COSINE")[7] == 0.8535533906
    assert listed("GRAD_V")[13] == 0


def test_a_preset_keeps_its_numbers_in_the_blocks_that_a_family_has() -> None:
    """As SuperMerger does: nothing is stretched, so that a ramp ends where the blocks end."""
    whole, fewer = by_name(preset("GRAD_A", SD15)), by_name(preset("GRAD_A", SDXL))
    assert fewer.pop("text_encoder_2") == 0
    assert fewer == {name: value for name, value in whole.items() if name in fewer}


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("INS", "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0"),
        ("IND", "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0"),
        ("INALL", "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0"),
        ("MIDD", "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0"),
        ("MIDD0.2", "1,0,0,0,0,0,.2,.4,.4,.2,0,0,0,0,0,0,0"),
        ("MIDD0.8", "1,0,0,0,0,.5,.8,.8,.4,0,0,0,0,0,0,0,0"),
        ("MOUT", "1,0,0,0,0,0,1,1,1,1,1,1,1,1,.5,0,0"),
        ("OUTD", "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0"),
        ("OUTS", "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1"),
        ("OUTALL", "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1"),
        ("NONE", "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0"),
        ("ALL", "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1"),
        ("ALL0.5", ".5,.5,.5,.5,.5,.5,.5,.5,.5,.5,.5,.5,.5,.5,.5,.5,.5"),
    ],
)
def test_presets_of_loras_are_the_published_ones_where_there_is_attention(name: str, published: str) -> None:
    expected = by_name(spelled_out([float(number) for number in published.split(",")], SD15))
    attended = {f"unet.{n.block}" for n in SD15.names() if n.block and ".attentions." in n.canonical}
    attended |= {"text_encoder"}
    found = by_name(lora_preset(name, SD15))
    assert {place: found[place] for place in attended} == {place: expected[place] for place in attended}


# -- in merges ---------------------------------------------------------------------------------------------------------

RAMP = [round(i / 25, 2) for i in range(26)]


def test_a_list_is_the_blocks_written_out(toy: Taken, other: Taken) -> None:
    blocks: dict[str, Any] = {"text_encoder": RAMP[0], "unet.mid": RAMP[13]}
    blocks |= {f"unet.in{i:02}": RAMP[1 + i] for i in range(12)} | {f"unet.out{i:02}": RAMP[14 + i] for i in range(12)}
    blocks |= {"unet.time": RAMP[1], "unet.out": RAMP[25]}
    one = planned("slerp", [toy, other], mbw=RAMP).identities()
    assert one == planned("slerp", [toy, other], blocks=blocks).identities()
    assert set(one) == {"unet", "text_encoder"}  # the VAE stays


@pytest.mark.parametrize("name", ["weighted_sum", "linear"])
def test_of_two_checkpoints_a_list_tells_the_share_of_the_second(name: str, toy: Taken, other: Taken) -> None:
    pairs = {f"unet.{block}": [0.9, 0.1] for block in ("mid", "in00", "time")}
    listed = [0.25, 0.1, *[0.0] * 11, 0.1, *[0.0] * 12]
    whole = planned(name, [toy, other], weights=[0.5, 0.5], mbw=listed)
    written = planned(name, [toy, other], weights=[1, 0], blocks=pairs | {"text_encoder": [0.75, 0.25]})
    assert whole.identities() == written.identities()


def test_blocks_come_before_the_list(toy: Taken, other: Taken) -> None:
    plan = planned("weighted_sum", [toy, other], weights=[1, 0], mbw=[0.25] * 26, blocks={"M00": [0.6, 0.4]})
    for row in plan.components["unet"]:
        assert share(plan, "unet", row.tensor.name) == (0.4 if BLOCK["unet", row.tensor.name] == "mid" else 0.25)


def test_a_list_without_base_leaves_text_encoders_to_the_setting(toy: Taken, other: Taken) -> None:
    plan = planned("weighted_sum", [toy, other], weights=[0.7, 0.3], mbw=[0.5] * 25)
    assert {row.parameters["weights"][1] for row in plan.components["text_encoder"]} == {0.3}
    assert {row.parameters["weights"][1] for row in plan.components["unet"]} == {0.5}


def test_a_preset_is_its_list(toy: Taken, other: Taken) -> None:
    one = planned("add_difference", [toy, other, toy], mbw_preset="GRAD_V")
    assert one.identities() == planned("add_difference", [toy, other, toy], mbw=listed("GRAD_V")).identities()


TWO = 'a = "flat"\nb = "ink"\n'


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (f"[slerp.x]\n{TWO}mbw = [0.5, 0.5]\n", "a list of 2 block weights means nothing in Stable Diffusion 1.x"),
        (f"[slerp.x]\n{TWO}mbw = {RAMP}\nmbw_preset = 'GRAD_V'\n", "`mbw` and `mbw_preset` are two lists"),
        (f"[linear.x]\ncheckpoints = ['flat', 'ink', 'ink']\nmbw = {RAMP}\n", "for two checkpoints, and there are 3"),
        (
            "[bake.x]\ncheckpoint = 'flat'\nloras.glow = { mbw = [1, 2, 3] }\n",
            "a list of 3 block weights means nothing",
        ),
    ],
)
def test_a_list_that_cannot_be_meant_is_a_mistake_of_the_recipe(world: World, table: str, message: str) -> None:
    world.recipe(table)
    (found,) = world.misfits()
    assert message in found


# -- in LoRAs' strengths -----------------------------------------------------------------------------------------------

PLACES = {
    "text_encoder": ("text_encoder", "text_model.encoder.layers.0.mlp.fc1.weight"),
    "in01": ("unet", "down_blocks.0.attentions.0.proj_in.weight"),
    "mid": ("unet", "mid_block.attentions.0.proj_in.weight"),
    "time": ("unet", "time_embedding.linear_1.weight"),
}


def strengths(**use: Any) -> dict[str, float]:
    found = Strengths(use, SD15)
    return {name: found.at(*place) for name, place in PLACES.items()}


def test_a_list_multiplies_the_strength_and_leaves_what_it_does_not_name() -> None:
    counted = [0.5, 1, *[0] * 6, 0.3, *[0] * 8]  # of 17: BASE, IN01, …
    counted[7], counted[8] = 0.3, 0
    assert strengths(strength=0.1, mbw=counted) == {"text_encoder": 0.05, "in01": 0.1, "mid": 0.03, "time": 0.1}


def test_a_components_strength_is_multiplied_and_a_blocks_is_not() -> None:
    found = strengths(strength=0.5, text_encoder=0.2, mbw_preset="ALL0.5", blocks={"unet.mid": 0.9})
    assert found == {"text_encoder": 0.1, "in01": 0.25, "mid": 0.9, "time": 0.5}


def test_without_a_list_a_strength_is_the_number_that_was_written() -> None:
    assert strengths(strength=0.7) == dict.fromkeys(PLACES, 0.7)


def test_a_part_of_weights_names_has_a_strength_of_its_own_within_its_block() -> None:
    found = strengths(
        strength=0.5, mbw_preset="ALL0.5", blocks={"unet.mid": 0.9, "M00:proj_in": 0.1, "unet:linear": 2.0}
    )
    assert found == {"text_encoder": 0.25, "in01": 0.25, "mid": 0.1, "time": 2.0}
