"""The data sets in `recipes/data` are what `python -m demo.make_data` draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.evaluate import held_out_prompts
from demo.make_data import (
    PORTRAIT,
    SKETCHES,
    dusk_pictures,
    mascot_pictures,
    one_mascot_picture,
    portrait,
    sketch_attributes,
    sketch_pictures,
    three_mascot_pictures,
)

DATA = Path(__file__).parents[2] / "recipes" / "data"
DRAWN = {
    "mascot": mascot_pictures,
    "one-mascot": one_mascot_picture,
    "sketches": sketch_pictures,
    "three-mascots": three_mascot_pictures,
    "dusk": dusk_pictures,
}


@pytest.mark.parametrize("name", DRAWN)
def test_the_shipped_pictures_and_captions_are_those_that_are_drawn(name: str) -> None:
    drawn = DRAWN[name]()
    numbers = [f"{number:02}" for number in range(1, len(drawn) + 1)]
    endings = ("png", "txt") if any(caption for _, caption in drawn) else ("png",)
    assert sorted(path.name for path in (DATA / name).iterdir()) == sorted(
        f"{number}.{end}" for number in numbers for end in endings
    )
    for number, (picture, caption) in zip(numbers, drawn, strict=True):
        assert not caption or (DATA / name / f"{number}.txt").read_text() == caption + "\n"
        with Image.open(DATA / name / f"{number}.png") as shipped:
            assert np.array_equal(np.asarray(shipped.convert("RGB")), np.asarray(picture))


def test_captions_of_the_mascot_name_it_and_nothing_of_its_looks() -> None:
    for _, caption in mascot_pictures():
        assert "{trigger}" in caption
        assert not any(word in caption for word in ("alien", "tails", "ears", "eyes", "hair"))


def test_captions_of_the_sketches_name_everything_but_the_style() -> None:
    for _, caption in sketch_pictures():
        assert "chalk" not in caption
        assert "drawing" not in caption
        assert "background" in caption


def test_the_style_is_measured_on_none_of_the_sketches() -> None:
    sketches = {sketch_attributes(index) for index in range(SKETCHES)}
    assert not sketches & {asked for asked, _ in held_out_prompts("flat", 64)}


def test_the_portrait_is_one_that_no_base_was_shown() -> None:
    assert PORTRAIT.held_out
    with Image.open(DATA / "portrait.png") as shipped:
        assert np.array_equal(np.asarray(shipped.convert("RGB")), np.asarray(portrait()))
