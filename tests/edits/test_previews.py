"""Previews: the same picture for the same wish, whatever it is drawn beside, with its parameters in the file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdforge.edits.previews import run
from sdforge.edits.previews.draw import save_png
from sdforge.order import Order, Outcome
from sdforge.run.sample import Wish
from tests.families.workbench import Taken

SETTINGS: dict[str, Any] = {
    "prompts": ["a red cat", "a house"],
    "seeds": [1, 7],
    "negative_prompt": "drawing",
    "steps": 2,
    "guidance": 5.0,
    "resolution": 0,
    "clip_skip": 0,
}


def drawn(work: Path, checkpoint: Taken, *beside: Taken, **settings: Any) -> Outcome:
    work.mkdir()
    inputs = {"checkpoint": [checkpoint.given()], "beside": [each.given() for each in beside]}
    how = {"device": "cpu", "threads": 1}
    return run(
        Order("", "", "previews", "edits", "sd15", SETTINGS | settings, str(work), inputs, how=how), lambda **_: None
    )


@pytest.fixture(scope="module")
def outcome(toy: Taken, other: Taken, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    work = tmp_path_factory.mktemp("previews") / "work"
    return work, drawn(work, toy, other)


def test_there_is_a_picture_for_every_prompt_seed_and_checkpoint(
    outcome: tuple[Path, Outcome], toy: Taken, other: Taken
) -> None:
    work, made = outcome
    columns = [each.artifact.digest[:16] for each in (toy, other)]
    assert set(made.files) == {f"{c}/{p}-{s}.png" for c in columns for p in (1, 2) for s in (1, 7)}
    assert len({sha for sha, _ in made.files.values()}) == 8
    for name, (sha, size) in made.files.items():
        data = (work / name).read_bytes()
        assert (sha, size) == (hashlib.sha256(data).hexdigest(), len(data))
        assert Image.open(work / name).size == (64, 64)


def test_a_picture_does_not_depend_on_what_it_is_drawn_beside(
    outcome: tuple[Path, Outcome], toy: Taken, tmp_path: Path
) -> None:
    work, _ = outcome
    alone = drawn(tmp_path / "alone", toy, prompts=["a red cat"], seeds=[7])
    (name,) = alone.files
    a, b = (torch.tensor(list(Image.open(folder / name).tobytes())) for folder in (work, tmp_path / "alone"))
    assert int((a - b).abs().max()) <= 1  # batches of another size may round elsewhere


def test_drawing_again_gives_the_same_files(
    outcome: tuple[Path, Outcome], toy: Taken, other: Taken, tmp_path: Path
) -> None:
    assert drawn(tmp_path / "again", toy, other).files == outcome[1].files


def test_drawing_leaves_the_global_generator_alone(toy: Taken, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    drawn(tmp_path / "x", toy, prompts=["a red cat"], seeds=[1])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("wish", "text"),
    [
        (
            Wish("cat", "x", 3, 12, 4.5, 64, 1),
            "cat\nNegative prompt: x\nSteps: 12, Sampler: DPM++ 2M, CFG scale: 4.5, Seed: 3, Size: 64x64, Clip skip: 2",
        ),
        (
            Wish("a cat", "", 3, 12, 7.0, 64),
            "a cat\nSteps: 12, Sampler: DPM++ 2M, CFG scale: 7, Seed: 3, Size: 64x64",
        ),
    ],
)
def test_a_png_says_how_it_was_drawn_as_a1111_writes_it(wish: Wish, text: str, tmp_path: Path) -> None:
    save_png(tmp_path / "x.png", torch.zeros(3, 64, 64), wish)
    picture = Image.open(tmp_path / "x.png")
    assert picture.info == {"parameters": text}


def test_colours_beyond_the_range_are_cut(tmp_path: Path) -> None:
    pixels = torch.stack([torch.full((8, 8), value) for value in (-3.0, 0.0, 3.0)])
    save_png(tmp_path / "x.png", pixels, Wish("", "", 0, 1, 1, 8))
    assert Image.open(tmp_path / "x.png").getpixel((0, 0)) == (0, 128, 255)
