"""Every training on every family that it is meant for: a step of the whole loop, from pictures to what is saved."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sdforge.families import family, family_names
from sdforge.order import Given
from tests.families.toys import write_family
from tests.families.workbench import Taken, take
from tests.run.order import order, shown, train
from tests.trainings.test_training_contract import OWN, TRAININGS

LOOPED = sorted({*TRAININGS} - {*OWN})
SEEN = {
    "sd15": False,
    "unclip": True,
}  # what the contract tries already: families, and whether those are shown pictures


def meant(name: str, of: str) -> bool:
    """Say whether a training is meant for a family: what learns from words for all that draw from words alone."""
    return shown(name) == family(of).image_embeddings


CASES = [(name, of) for name in LOOPED for of in family_names() if meant(name, of) and SEEN.get(of) != shown(name)]


@pytest.fixture(scope="module")
def bases(toys: Path) -> dict[str, Taken]:
    return {of: take(write_family(toys / of, of)) for of in sorted({of for _, of in CASES})}


def test_the_matrix_has_all_three_families_that_draw_from_words() -> None:
    assert {of for name, of in CASES if not shown(name)} == {"sd2", "sdxl"}
    assert {of for name, of in CASES if shown(name)} == {"image_variations"}
    assert {name for name, _ in CASES} == {*LOOPED}


@pytest.mark.parametrize(("name", "of"), CASES)
def test_a_step_learns_something_and_saves_it(
    name: str, of: str, bases: dict[str, Taken], pictures: Given, tmp_path: Path
) -> None:
    outcome = train(order(tmp_path, name, bases[of], pictures, steps=1))
    assert math.isfinite(outcome.record["losses"][0])
    assert math.isfinite(outcome.record["norm"])
    assert outcome.record["norm"] > 0
    assert all(rows for rows in outcome.components.values())
