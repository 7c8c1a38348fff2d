"""Class images: a data set that a checkpoint draws, the same however often the drawing stops."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdforge.artifact import Artifact, made_artifact
from sdforge.method import method
from sdforge.order import Order, Outcome
from sdforge.run.states import Stopped
from sdforge.trainings import class_images
from sdforge.trainings.class_images import TABLE, advise
from tests.families.workbench import Taken

SMALL: dict[str, Any] = {"steps": 2, "guidance": 1.0, "precision": "fp32", "resolution": 64}


def wanted(work: Path, on: Taken, **changes: Any) -> Order:
    work.mkdir(parents=True, exist_ok=True)
    raw = {"on": "base", "prompts": ["a cat", "a house"], **SMALL, **changes}
    return Order(
        key="",
        target="toy",
        method="class_images",
        group="trainings",
        family="sd15",
        settings=method("class_images").table.model_validate(raw).settings() | {"seed": 3},
        work=str(work),
        inputs={"on": [on.given()]},
        states=str(work / "states"),
        how={"device": "cpu", "threads": 1},
    )


def run(order: Order, stop: int = -1) -> Outcome:
    counted = itertools.count()
    return class_images.run(order, lambda **_: None, lambda: next(counted) == stop)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pictures in three batches."""
    monkeypatch.setattr("sdforge.trainings.class_images.draw.BATCH", 2)


def test_every_picture_says_its_prompt_and_is_kept_without_loss(toy: Taken, tmp_path: Path) -> None:
    outcome = run(wanted(tmp_path, toy, count=5))
    rows: Any = outcome.facts["pictures"]
    assert sorted(row[1] for row in rows) == ["a cat"] * 3 + ["a house"] * 2
    assert {row[0] for row in rows} == {sha for sha, _ in outcome.files.values()}
    assert len({row[0] for row in rows}) == 5
    assert list(outcome.files) == [f"{i}.png" for i in range(1, 6)]
    for name in outcome.files:
        with Image.open(tmp_path / name) as picture:
            assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (64, 64))
            assert picture.info["parameters"].startswith(("a cat\n", "a house\n"))
    assert (outcome.grade, outcome.components) == ("B", {})


def test_it_is_a_data_set_as_any_other(toy: Taken, tmp_path: Path) -> None:
    outcome = run(wanted(tmp_path, toy, count=2, prompts=[], prompt="a cat"))
    artifact = made_artifact("dataset", "sd15", {}, outcome.facts)
    assert artifact.kind == "dataset"
    assert [row[1:] for row in artifact.notes["rows"]] == [["a cat", 1]] * 2
    assert artifact.identity == artifact.whole != ""


def test_a_drawing_that_stops_and_goes_on_ends_with_the_same_bytes(toy: Taken, tmp_path: Path) -> None:
    straight = run(wanted(tmp_path / "straight", toy, count=5))
    broken = wanted(tmp_path / "broken", toy, count=5)
    with pytest.raises(Stopped):
        run(broken, stop=1)
    kept = list(Path(broken.states).glob("*.png"))
    assert len(kept) == 2
    with pytest.raises(Stopped):
        run(broken, stop=1)
    assert set(kept) < set(Path(broken.states).glob("*.png"))
    resumed = run(broken)
    assert resumed.files == straight.files
    assert resumed.facts == straight.facts


def test_a_batch_of_which_a_picture_is_damaged_or_gone_is_drawn_again(toy: Taken, tmp_path: Path) -> None:
    straight = run(wanted(tmp_path / "straight", toy, count=5))
    broken = wanted(tmp_path / "broken", toy, count=5)
    with pytest.raises(Stopped):
        run(broken, stop=2)
    first, _, third, _ = sorted(Path(broken.states).glob("*.png"))
    first.unlink()
    third.chmod(0o644)
    third.write_bytes(b"damaged")
    assert run(broken).files == straight.files


def test_pictures_depend_on_the_seed_and_their_number(toy: Taken, tmp_path: Path) -> None:
    more, fewer = (run(wanted(tmp_path / str(n), toy, count=n)).files for n in (4, 2))
    assert list(more.items())[:2] == list(fewer.items())
    order = wanted(tmp_path / "seed", toy, count=2)
    order.settings["seed"] = 4
    assert not {sha for sha, _ in run(order).files.values()} & {sha for sha, _ in fewer.values()}
    pixels = [np.asarray(Image.open(tmp_path / "4" / name)).tobytes() for name in more]
    assert len(set(pixels)) == 4


def _advice(**changes: Any) -> list[Any]:
    on = Artifact("checkpoint", "sd15")
    return advise(TABLE.model_validate({"on": "base", **changes}), {"on": [on]})


def test_one_of_prompt_and_prompts_says_what_is_drawn() -> None:
    assert _advice(prompt="a cat") == _advice(prompts=["a cat"]) == []
    for changes in ({}, {"prompt": "a cat", "prompts": ["a dog"]}):
        ((_, _, sentence, hint, warning),) = _advice(**changes)
        assert sentence.startswith("what is drawn stands in `prompt`, or in `prompts`")
        assert hint
        assert not warning


def test_progress_is_told_by_pictures(toy: Taken, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    class_images.run(wanted(tmp_path, toy, count=5), lambda **event: told.append(event), lambda: False)
    assert [(e["step"], e["steps"]) for e in told if "step" in e] == [(2, 5), (4, 5), (5, 5)]
    assert json.dumps(told)


def test_a_budget_of_memory_draws_fewer_at_once_and_changes_nothing_that_is_seen(toy: Taken, tmp_path: Path) -> None:
    plain = run(wanted(tmp_path / "plain", toy, count=2))
    said: list[Any] = []
    tight = dataclasses.replace(wanted(tmp_path / "tight", toy, count=2), how={"device": "cpu", "vram": 1})
    drawn = class_images.run(tight, lambda **event: said.append(event.get("fits")), lambda: False)
    assert "1 picture at once" in said
    assert drawn.fingerprint == plain.fingerprint | {"micro_batch": 1}
    for name in plain.files:
        pair = [np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("plain", "tight")]
        assert np.abs(pair[0] - pair[1]).max() <= 1
    wide = dataclasses.replace(tight, work=str(tmp_path / "wide"), states="", how={"device": "cpu", "vram": 10**9})
    Path(wide.work).mkdir()
    class_images.run(wide, lambda **event: said.append(event.get("fits")), lambda: False)
    assert "2 pictures at once" in said
