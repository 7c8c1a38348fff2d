"""CLIP scores of pictures are the cosines that transformers' own CLIP gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdforge.checks.score import run
from sdforge.errors import UsageError
from sdforge.order import Given, Order, Outcome
from sdforge.run.tokens import Words
from tests.families.toys import VISION
from tests.families.workbench import Taken, keep, take
from tests.trainings.clips import write_clip

PROMPTS = ("a red cat", "a house")
EDGE = VISION["image_size"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("score") / "clip")


@pytest.fixture(scope="module")
def words(folder: Path, toy: Taken, tmp_path_factory: pytest.TempPathFactory) -> Taken:
    """A checkpoint whose text encoder is that CLIP's own."""
    from transformers import CLIPModel

    text = CLIPModel.from_pretrained(folder).text_model.state_dict()
    own = {name: text[name.removeprefix("text_model.")].half() for name in toy.tensors("text_encoder")}
    parts = {"unet": toy.tensors("unet"), "text_encoder": own, "vae": toy.tensors("vae")}
    return keep(tmp_path_factory.mktemp("words"), parts, facts=toy.artifact.facts, words=toy.vocabulary)


@pytest.fixture
def rows(tmp_path: Path) -> list[list[Any]]:
    """Pictures of the size that the CLIP looks at, so that nothing is resized."""
    found = []
    for i, prompt in enumerate(PROMPTS):
        noise = np.random.default_rng(i).integers(0, 256, (EDGE, EDGE, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
        found.append([str(tmp_path / f"{i}.png"), str(i), prompt, i + 1, 1])
    return found


def scored(folder: Path, rows: list[list[Any]], least: float = -1.0, **more: Given) -> Outcome:
    inputs = {"pictures": [Given("pictures", pictures=rows)], "clip": [take(folder).given()]}
    inputs |= {role: [given] for role, given in more.items()}
    settings = {"text": least, "image": least}
    order = Order("", "", "score", "checks", "sd15", settings, "", inputs, how={"device": "cpu", "threads": 1})
    return run(order, lambda **_: None)


@torch.no_grad()
def test_a_text_score_is_the_mean_cosine_of_pictures_and_their_prompts(
    folder: Path, words: Taken, rows: list[list[Any]]
) -> None:
    from transformers import CLIPModel

    ids = torch.tensor([Words(words.vocabulary, []).encode(prompt) for prompt in PROMPTS])
    pixels = torch.stack([torch.from_numpy(np.asarray(Image.open(row[0]))).permute(2, 0, 1) / 255 for row in rows])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    model = CLIPModel.from_pretrained(folder)
    model.text_model.half().float()  # as the checkpoint keeps it
    expected = model(input_ids=ids, pixel_values=(pixels - mean) / std)
    cosines = (expected.image_embeds * expected.text_embeds).sum(1)
    made = scored(folder, rows, words=words.given())
    assert made.facts["measured"]["text"] == pytest.approx(float(cosines.mean()), abs=2e-5)
    assert made.facts["passed"]
    failed = scored(folder, rows, 0.99, words=words.given())
    assert not failed.facts["passed"]
    assert failed.facts["says"].endswith("is less than 0.99")


def test_a_picture_is_as_near_to_itself_as_can_be(folder: Path, rows: list[list[Any]]) -> None:
    itself = Given("picture", pictures=[[rows[0][0], "0", "", 1]])
    assert scored(folder, rows[:1], 0.999, to=itself).facts["measured"] == {"image": pytest.approx(1, abs=1e-5)}
    assert scored(folder, rows[1:], to=itself).facts["measured"]["image"] < 0.999


def test_a_text_encoder_that_is_cut_off_is_refused(toy: Taken, rows: list[list[Any]], tmp_path: Path) -> None:
    short = write_clip(tmp_path / "short", num_hidden_layers=4)
    with pytest.raises(UsageError, match="layers, the CLIP's text model"):
        scored(short, rows, words=toy.given())
