"""What drawings say, and which combinations training never sees."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from demo import attributes as words
from demo.attributes import HELD_OUT_ONE_IN, Attributes, caption, draw_combinations
from demo.evaluate import held_out_prompts
from demo.picture_sets import combinations
from demo.tokenizer import Tokenizer

ANY_ATTRIBUTES = st.builds(
    Attributes,
    expression=st.sampled_from(words.EXPRESSIONS),
    person=st.sampled_from(words.PERSONS),
    hair=st.sampled_from(words.HAIR_STYLES),
    hair_colour=st.sampled_from(words.HAIR_COLOURS),
    eye_colour=st.sampled_from(words.EYE_COLOURS),
    background=st.sampled_from(words.BACKGROUNDS),
    accessory=st.sampled_from(words.ACCESSORIES),
)


def test_the_bases_never_learn_from_a_combination_that_is_held_out() -> None:
    learned = {*combinations("flat", 4000), *combinations("ink", 2000)}
    assert not any(shown.held_out for shown in learned)
    assert not learned & {asked for asked, _ in held_out_prompts("flat", 64)}


def test_every_prompt_of_the_measurement_asks_for_a_combination_of_its_own_that_is_held_out() -> None:
    asked = [attributes for attributes, _ in held_out_prompts("ink", 64)]
    assert all(attributes.held_out for attributes in asked)
    assert len(set(asked)) == 64


def test_one_combination_in_sixteen_is_held_out() -> None:
    faces = product(words.EXPRESSIONS, words.PERSONS, words.HAIR_STYLES, words.HAIR_COLOURS)
    held_out = [Attributes(*face, "blue", "pink", "hat").held_out for face in faces]
    # 960 draws at 1/16 have a standard deviation of 0.008
    assert abs(sum(held_out) / len(held_out) - 1 / HELD_OUT_ONE_IN) < 0.024


def test_the_order_of_combinations_never_changes() -> None:
    first = caption(next(draw_combinations(1, held_out=False)))
    assert (
        first
        == "flat drawing of a winking boy with short purple hair, blue eyes, wearing a red ribbon, orange background"
    )


@given(ANY_ATTRIBUTES, ANY_ATTRIBUTES)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_two_drawings_that_differ_have_captions_that_differ(one: Attributes, other: Attributes) -> None:
    assert (caption(one) == caption(other)) == (one == other)


@given(ANY_ATTRIBUTES)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_every_word_of_a_caption_is_one_token(shown: Attributes) -> None:
    tokenizer = Tokenizer.new()
    (ids,) = tokenizer.ids([caption(shown)])
    end = tokenizer.id_of("<|endoftext|>")
    assert ids.index(end) - 1 == len(caption(shown).replace(",", " ,").split())


def test_prompts_ask_with_and_without_the_word_for_the_style() -> None:
    prompts = [text for _, text in held_out_prompts("ink", 64)]
    assert [text.startswith("ink drawing of ") for text in prompts] == [True, False] * 32
