"""Drawings depend on attributes, look and seed, and on nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from demo import attributes as words
from demo.attributes import Attributes
from demo.drawing import draw
from demo.palettes import CHALK, FLAT, INK, Look

SHOWN = Attributes("smiling", "elf", "long", "blue", "green", "yellow", "glasses")
OTHERWISE = {
    "expression": words.EXPRESSIONS,
    "person": words.PERSONS,
    "hair": words.HAIR_STYLES,
    "hair_colour": words.HAIR_COLOURS,
    "eye_colour": words.EYE_COLOURS,
    "background": words.BACKGROUNDS,
    "accessory": words.ACCESSORIES,
}


@pytest.mark.parametrize(
    ("look", "sha256"),
    [(FLAT, "d47108fd2598a2eb"), (INK, "3aaefcb37de3fba3"), (CHALK, "30dc4135de0db701")],
    ids=["flat", "ink", "chalk"],
)
def test_a_drawing_is_the_same_bytes_every_time(look: Look, sha256: str) -> None:
    """The digests are of Pillow 13's pixels."""
    assert hashlib.sha256(draw(SHOWN, look, 7).tobytes()).hexdigest()[:16] == sha256


@pytest.mark.parametrize("name", OTHERWISE)
def test_every_value_of_an_attribute_is_drawn_differently(name: str) -> None:
    drawings = {draw(replace(SHOWN, **{name: value}), FLAT, 7).tobytes() for value in OTHERWISE[name]}
    assert len(drawings) == len(OTHERWISE[name])


def test_the_seed_moves_a_drawing_a_little_and_no_more() -> None:
    one, other = (np.asarray(draw(SHOWN, FLAT, seed), dtype=float) for seed in (7, 8))
    apart = np.abs(one - other).mean()
    assert 0 < apart < 0.5 * np.abs(one - one.mean(axis=(0, 1))).mean()
