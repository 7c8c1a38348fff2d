"""DreamBooth: what the pictures say, and what is said of it before it runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sdforge.artifact import Artifact
from sdforge.order import Given
from sdforge.trainings.dreambooth import TABLE, advise
from tests.families.workbench import Taken
from tests.run.order import order, train
from tests.trainings.test_prior import begun

PROMPT = "a <toy> cat"


@pytest.mark.parametrize("captions", [False, True])
def test_pictures_say_the_prompt_and_the_class_says_its_own(
    captions: bool, toy: Taken, pictures: Given, tmp_path: Path
) -> None:
    kept = dataclasses.replace(pictures, identity="class", pictures=[[*pictures.pictures[0][:2], "a house", 1]])
    empty = [[*row[:2], "" if i == 0 else row[2], row[3]] for i, row in enumerate(pictures.pictures)]
    given = dataclasses.replace(pictures, pictures=empty)
    training = begun("dreambooth", toy, given, tmp_path, prior=kept, captions=captions)
    subject, prior = ({picture.caption for picture in shown.pictures} for shown in training.shown)
    own = {row[2] for row in empty[1:]}
    assert subject == ({PROMPT} | own if captions else {PROMPT})
    assert prior == {"a house"}


def test_held_out_pictures_say_the_prompt_too(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    held = dataclasses.replace(pictures, held_out=1)
    assert [p.caption for p in begun("dreambooth", toy, held, tmp_path).validation.pictures] == [PROMPT]


def test_captions_that_are_replaced_decide_nothing(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    other = dataclasses.replace(pictures, pictures=[[*row[:2], "a red house", row[3]] for row in pictures.pictures])
    a, b = (train(order(tmp_path / str(i), "dreambooth", toy, g, steps=2)) for i, g in enumerate((pictures, other)))
    assert a.sha256 == b.sha256


def _advice(drawn: Artifact | None, **changes: Any) -> list[Any]:
    raw = {"on": "base", "dataset": "drawings", "prompt": PROMPT, **changes}
    on, dataset = Artifact("checkpoint", "sd15"), Artifact("dataset", whole="x", notes={"rows": []})
    inputs: dict[str, list[Artifact | None]] = {"on": [on], "dataset": [dataset]}
    if "prior" in changes:
        inputs["prior"] = [drawn]
    return advise(TABLE.model_validate(raw), inputs)


def _class(caption: str) -> Artifact:
    return Artifact("dataset", whole="y", notes={"rows": [["0", caption, 1]]})


def test_a_class_that_is_not_kept_is_noticed() -> None:
    ((role, _, sentence, hint, warning),) = _advice(None)
    assert (role, warning) == ("dataset", True)
    assert "`prior`" in sentence
    assert "class_images" in hint


def test_a_class_that_says_what_the_subject_says_is_refused() -> None:
    ((role, _, sentence, _, warning),) = _advice(_class(PROMPT), prior="cats")
    assert (role, warning) == ("prior", False)
    assert repr(PROMPT) in sentence


@pytest.mark.parametrize("prior", [None, _class("a cat")])
def test_a_class_of_other_words_is_well_also_while_it_is_not_drawn(prior: Artifact | None) -> None:
    assert _advice(prior, prior="cats") == []


def test_what_no_weights_can_be_is_refused_here_too() -> None:
    assert [row[1] for row in _advice(None, train=["vae"], prior="cats")] == ["block"]
