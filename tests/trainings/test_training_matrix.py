"""Every training on every family that it is meant for: a step of it, from pictures to what is saved."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from sdforge.families import family, family_names
from sdforge.method import module_of
from sdforge.order import Given, Outcome
from tests.families.toys import write_family
from tests.families.workbench import Taken, take
from tests.run.order import order, shown, train
from tests.trainings.clips import write_clip
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


# what a step of those that do without the loop takes: the least
LEAST: dict[str, dict[str, Any]] = {
    "aesthetic_gradient": {"steps": 1, "learning_rate": 1e-3},
    "class_images": {"steps": 1, "count": 1, "guidance": 2.0, "precision": "fp32", "resolution": 64, "prompts": []},
    "null_text_inversion": {"steps": 2, "inner": 1, "early_stop": 0.0, "guidance": 2.0},
}
ENCODERS = {"aesthetic_gradient": 1}  # how many text encoders it can have at most


def meant_alone(name: str, of: str) -> bool:
    """Say whether a training without the loop is meant for a family: it draws from words, not from pictures."""
    found = family(of)
    return not found.image_embeddings and len(found.text_encoders) <= ENCODERS.get(name, 2)


ALONE = [(name, of) for name in OWN for of in family_names() if meant_alone(name, of)]
# what a loop can do besides → the training, its settings
BESIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "class images": ("dreambooth", {"prior": True}),
    "what the checkpoint says without the word": ("lora", {"preserve": "cat", "trigger": "<toy>"}),
    "directions and convolutions": ("lora", {"dora": True, "rank": 1, "conv_rank": 1}),
}


@pytest.fixture(scope="module")
def bases(toys: Path) -> dict[str, Taken]:
    return {of: take(write_family(toys / of, of)) for of in sorted({of for _, of in CASES + ALONE})}


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


def test_those_without_the_loop_are_meant_for_what_the_notes_say() -> None:
    assert set(OWN) == {*LEAST}
    meant_for = {name: {of for other, of in ALONE if other == name} for name in OWN}
    words = {"sd15", "sd2", "sdxl"}
    assert meant_for == {
        "aesthetic_gradient": words - {"sdxl"},
        "class_images": words,
        "null_text_inversion": words,
    }


@pytest.mark.parametrize(("name", "of"), ALONE)
def test_those_without_the_loop_make_something_finite(
    name: str, of: str, bases: dict[str, Taken], pictures: Given, toys: Path, tmp_path: Path
) -> None:
    asked = order(tmp_path, name, bases[of], pictures, **LEAST[name])
    others = {"clip": [take(write_clip(toys / "clip")).given()], "image": [_first(pictures)]}
    asked = dataclasses.replace(asked, inputs=asked.inputs | others)
    outcome: Outcome = module_of("trainings", name).run(asked, lambda **_: None, lambda: False)
    assert all(math.isfinite(loss) for loss in outcome.record.get("losses", []))
    if name == "class_images":
        assert list(outcome.files) == ["1.png"]
    else:
        assert outcome.record["norm"] > 0
        assert all(rows for rows in outcome.components.values())


def _first(pictures: Given) -> Given:
    return Given("picture", "picture", pictures=[[*pictures.pictures[0][:2], "", 1]])


@pytest.mark.parametrize("of", ["sd2", "sdxl"])
@pytest.mark.parametrize("what", BESIDES)
def test_a_step_with_more_than_the_pictures_runs_on_every_family(
    what: str, of: str, bases: dict[str, Taken], pictures: Given, tmp_path: Path
) -> None:
    name, changes = BESIDES[what]
    if "prior" in changes:
        rows = [[*row[:2], "a cat", 1] for row in pictures.pictures]
        changes = {"prior": dataclasses.replace(pictures, identity="class", pictures=rows)}
    found = train(order(tmp_path, name, bases[of], pictures, steps=1, **changes)).record
    assert math.isfinite(found["losses"][0])
    assert found["norm"] > 0
