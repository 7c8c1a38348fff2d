"""Block patterns: the longest literal prefix decides, and what cannot be decided is refused."""

from __future__ import annotations

import pytest

from sdforge.errors import UsageError
from sdforge.families import family
from sdforge.method import block_places, literal, resolve_blocks, resolve_elements, spelled
from tests.planner.conftest import World

SD15 = family("sd15")


def decided(*patterns: str) -> dict[str, str]:
    """Return block → the pattern that decides there."""
    return {".".join(filter(None, place)): found for place, found in resolve_blocks(patterns, SD15).items()}


def test_a_component_names_all_its_blocks() -> None:
    assert set(decided("unet")) == {"unet." + block for component, block in block_places(SD15) if component == "unet"}


def test_the_unet_has_the_blocks_that_merge_programs_know() -> None:
    blocks = {block for component, block in block_places(SD15) if component == "unet"}
    counted = {f"in{i:02}" for i in range(12)} | {f"out{i:02}" for i in range(12)}
    assert blocks == {"time", "mid", "out"} | counted


def test_a_question_mark_is_one_letter() -> None:
    assert set(decided("unet.in0?")) == {f"unet.in0{i}" for i in range(10)}


def test_a_set_of_letters_is_a_choice() -> None:
    assert set(decided("unet.in1[01]")) == {"unet.in10", "unet.in11"}


def test_a_star_over_blocks_leaves_the_other_components_alone() -> None:
    assert {place.partition(".")[0] for place in decided("unet.*")} == {"unet"}


@pytest.mark.parametrize(("name", "block"), [("IN04", "unet.in04"), ("M00", "unet.mid"), ("OUT03", "unet.out03")])
def test_blocks_go_by_the_names_of_merge_programs_too(name: str, block: str) -> None:
    assert decided(name) == {block: name}
    assert spelled(name) == block


def test_so_do_several_of_them() -> None:
    assert decided("OUT1?") == {"unet.out10": "OUT1?", "unet.out11": "OUT1?"}
    assert decided("IN0?", "IN04")["unet.in04"] == "IN04"


@pytest.mark.parametrize(
    ("patterns", "place", "winner"),
    [
        (("unet", "unet.mid"), "unet.mid", "unet.mid"),
        (("unet.*", "unet.in0?"), "unet.in04", "unet.in0?"),
        (("unet.in0?", "unet.in04"), "unet.in04", "unet.in04"),
        (("*", "unet"), "unet.mid", "unet"),
        (("unet.in0?", "IN04"), "unet.in04", "IN04"),
    ],
)
def test_the_longest_literal_prefix_wins(patterns: tuple[str, ...], place: str, winner: str) -> None:
    assert decided(*patterns)[place] == winner
    assert decided(*reversed(patterns))[place] == winner


def test_a_whole_name_is_longer_than_the_same_letters_with_a_star() -> None:
    assert literal("unet.mid") > literal("unet.mid*")


def test_two_patterns_of_equal_length_that_meet_are_refused() -> None:
    with pytest.raises(UsageError) as caught:
        decided("unet.in0?", "unet.in0[0-4]")
    assert caught.value.message == "the block patterns 'unet.in0?' and 'unet.in0[0-4]' both match unet.in00"
    assert caught.value.hint == "make one of them longer before its wildcard"


def test_two_patterns_of_equal_length_that_do_not_meet_are_fine() -> None:
    assert len(decided("unet.in0?", "unet.in1?")) == 12


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("unet.midd", "did you mean 'unet.mid'?"),
        ("unet.in12", "did you mean 'unet.in11'?"),
        ("zzz", "blocks are "),
        ("text_encoder_2", "did you mean 'text_encoder'?"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(pattern: str, hint: str) -> None:
    with pytest.raises(UsageError, match=r"matches nothing in Stable Diffusion 1\.x") as caught:
        decided(pattern)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        '[weighted_sum.x]\ncheckpoints = ["flat", "ink"]\nweights = [0.5, 0.5]\nblocks = { "unet.midd" = [1, 0] }\n',
        '[bake.x]\ncheckpoint = "flat"\nloras.glow = { blocks = { "unet.midd" = 1 } }\n',
        '[slerp.x]\na = "flat"\nb = "ink"\nblocks = { "unet.midd" = 0.1 }\n',
    ],
)
def test_a_pattern_that_matches_nothing_is_a_mistake_of_the_recipe(world: World, text: str) -> None:
    world.recipe(text)
    assert world.misfits() == ["the block pattern 'unet.midd' matches nothing in Stable Diffusion 1.x"]


def test_a_swap_of_nothing_is_refused_as_a_bake_of_nothing_is(world: World) -> None:
    world.recipe('[swap.x]\ncheckpoint = "flat"\n[bake.y]\ncheckpoint = "flat"\n')
    assert world.misfits() == ["there is nothing to swap", "there is nothing to bake"]


# -- elements: some tensors of a block ---------------------------------------------------------------------------------


def elements(*patterns: str) -> dict[str, str]:
    """Return tensor → the pattern with elements that decides there."""
    return {".".join(place): found for place, found in resolve_elements(patterns, SD15).items()}


def test_what_stands_behind_a_colon_is_a_part_of_tensors_names() -> None:
    """SuperMerger's `OUT04:attn1.to_k:0.5`, and what it calls OUT02-OUT05."""
    found = elements("OUT04:attn1.to_k")
    assert list(found) == ["unet.up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_k.weight"]
    assert len(elements("unet.out0[2-5]:attn1.to_k")) == 3  # OUT02 has no attention
    assert len(elements("unet:attn?.to_k")) == 2 * 16


def test_patterns_without_elements_are_decided_apart() -> None:
    assert elements("unet", "OUT04") == {}
    assert set(decided("unet.mid", "unet.mid:attn1").values()) == {"unet.mid"}


@pytest.mark.parametrize(
    ("patterns", "winner"),
    [
        (("unet:attn1", "unet.mid:attn1"), "unet.mid:attn1"),
        (("M00:attn1", "M00:attn1.to_q"), "M00:attn1.to_q"),
        (("M00:to_q.weight", "unet.m*:attn1.to_q.weight"), "M00:to_q.weight"),
    ],
)
def test_the_more_exact_block_wins_and_then_the_longer_part(patterns: tuple[str, ...], winner: str) -> None:
    tensor = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert elements(*patterns)[tensor] == elements(*reversed(patterns))[tensor] == winner


def test_two_parts_of_equal_length_that_meet_are_refused() -> None:
    with pytest.raises(UsageError) as caught:
        elements("M00:attn1.t", "M00:attn?.t")
    assert "'M00:attn1.t' and 'M00:attn?.t' both match unet.mid_block." in caught.value.message


@pytest.mark.parametrize(
    ("pattern", "message", "hint"),
    [
        ("M00:attn7", "no tensor of M00 has 'attn7' in its name", "names are diffusers': mid_block."),
        ("M00:", "no tensor of M00 has '' in its name", "names are diffusers'"),
        ("unet.mide:attn1", "the block pattern 'unet.mide' matches nothing", "did you mean 'unet.mid'?"),
        (":attn1.to_q", "the block pattern ':attn1.to_q' names no block", "did you mean 'unet:attn1.to_q'?"),
        ("vae:conv_in", "vae is merged whole, or stays", "name it without :conv_in"),
    ],
)
def test_elements_that_are_nowhere_are_refused(pattern: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        elements(pattern)
    assert message in caught.value.message
    assert hint in caught.value.hint
