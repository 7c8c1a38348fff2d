"""CLIP inversion: one embedding is found, from what the encoder says of pictures; nothing else moves."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from demo.attributes import draw_combinations
from demo.drawing import draw
from demo.palettes import FLAT
from sdforge.artifact import Artifact, Component
from sdforge.edits.export import run as export_run
from sdforge.order import Given, Order, Outcome
from sdforge.run.diffusion import Conditioning, Diffusion
from sdforge.run.images import plan_pictures, read_pixels
from sdforge.trainings.clip_inversion import TABLE, advise
from tests.families.toys import write_family
from tests.families.workbench import Taken, digest, keep, take
from tests.run.order import dataset, order, train

CPU = torch.device("cpu")
BASES = Path(__file__).parents[2] / "recipes" / "bases"


@pytest.fixture(scope="module", params=["unclip", "image_variations"])
def on(request: pytest.FixtureRequest, toys: Path) -> Taken:
    """The toys that are shown pictures."""
    return take(write_family(toys / request.param, request.param))


def loaded(taken: Taken) -> Diffusion:
    load = importlib.import_module(f"sdforge.families.{taken.artifact.family}.load").load
    found: Diffusion = load(taken.given(), CPU, torch.float32)
    return found


def invert(work: Path, on: Taken, pictures: Given, **changes: Any) -> tuple[Outcome, dict[str, Tensor]]:
    outcome = train(order(work, "clip_inversion", on, pictures, **changes))
    raw = load_file(work / outcome.pack)
    return outcome, {name.removeprefix("image_embedding."): tensor for name, tensor in raw.items()}


def mean_embedding(diffusion: Diffusion, pictures: Given) -> Tensor:
    planned = plan_pictures(pictures.pictures, diffusion.resolution, buckets=True)
    with torch.no_grad():
        return torch.cat([diffusion.encode_image(read_pixels(p, flip=False)) for p in planned]).mean(0, keepdim=True)


def test_it_begins_at_what_the_encoder_says_of_the_pictures(on: Taken, pictures: Given, tmp_path: Path) -> None:
    """A step of a rate relative to the embedding moves every number by that much at most."""
    mean_1D = mean_embedding(loaded(on), pictures)
    _, found = invert(tmp_path, on, pictures, steps=1, learning_rate=1e-2)
    moved = (found["image_embeds"] - mean_1D).abs().max() / mean_1D.square().mean().sqrt()
    assert float(moved) == pytest.approx(1e-2, rel=0.05)


def test_a_strong_pull_holds_it_where_it_begins(on: Taken, pictures: Given, tmp_path: Path) -> None:
    mean_1D = mean_embedding(loaded(on), pictures)
    distance = []
    for pull in (0.0, 1e3):
        _, found = invert(tmp_path / str(pull), on, pictures, steps=12, pull=pull, schedule="cosine")
        distance.append(float((found["image_embeds"] - mean_1D).norm()))
    assert distance[1] < 0.3 * distance[0]


def test_captions_say_nothing(on: Taken, pictures: Given, tmp_path: Path) -> None:
    said = dataclasses.replace(pictures, pictures=[[*row[:2], "a red house", row[3]] for row in pictures.pictures])
    outcomes = [invert(tmp_path / name, on, given, steps=2)[0] for name, given in (("a", pictures), ("b", said))]
    # their order is by content, captions included; of the texts, none was encoded
    assert [outcome.record["derived"]["made"] for outcome in outcomes] == [{"latents": 3}] * 2


def test_the_facts_say_under_which_convention_it_was_found(on: Taken, pictures: Given, tmp_path: Path) -> None:
    outcome, found = invert(tmp_path, on, pictures, steps=1)
    assert outcome.facts == {"level": 0, "null": "zeros", "encoder": on.identity("image_encoder")}
    assert found["image_embeds"].shape == (1, 12)
    assert found["image_embeds"].dtype == torch.float32
    told = loaded(on).imagine(found["image_embeds"]).added
    assert set(found) == {"image_embeds", *told}
    assert all(torch.equal(found[name], tensor) for name, tensor in told.items())


def test_two_trainings_are_the_same_to_the_bit(on: Taken, pictures: Given, tmp_path: Path) -> None:
    """The noise that is added to embeddings elsewhere, even at level 0, would be another one each time."""
    once, twice = (invert(tmp_path / name, on, pictures, steps=2)[0] for name in "ab")
    assert once.sha256 == twice.sha256


def test_a_file_of_it_is_read_as_it_was_written(on: Taken, pictures: Given, tmp_path: Path) -> None:
    outcome, tensors = invert(tmp_path / "a", on, pictures, steps=1)
    name = on.artifact.family
    kept = keep(tmp_path / "b", {"image_embedding": tensors}, kind="image_embedding", facts=outcome.facts, name=name)
    settings = {
        "title": "", "description": "", "licence": "", "trigger": [], "negative_prompt": "", "clip_skip": 0,
        "forms": ["image-embeddings"],
    }  # fmt: skip
    inputs = {"checkpoint": [on.given()], "image_embeddings": [kept.given()]}
    export_run(Order("", "", "export", "edits", name, settings, str(tmp_path), inputs), lambda **_: None)
    (file,) = (tmp_path / "image_embeddings").glob("*.safetensors")
    again = take(file)
    assert (again.artifact.kind, again.artifact.family, again.artifact.facts) == (
        "image_embedding",
        name,
        outcome.facts,
    )
    assert again.identity("image_embedding") == kept.identity("image_embedding")
    assert "image_embeds" in load_file(file)


def _advice(family: str, *components: str, **more: Any) -> list[Any]:
    table = TABLE.model_validate({"on": "base", "dataset": "drawings"} | more)
    on = Artifact("checkpoint", family, dict.fromkeys(components, Component("x", "x", "", "")))
    return advise(table, {"on": [on]})


def test_a_checkpoint_of_words_is_refused_in_the_plan_with_one_sentence() -> None:
    ((role, _, sentence, hint, warning),) = _advice("sd15", "unet", "text_encoder", "vae")
    assert (role, warning) == ("on", False)
    assert sentence == "`base` draws from words (Stable Diffusion 1.x): there is no image embedding to find"
    assert "unCLIP" in hint


def test_a_checkpoint_without_an_encoder_for_pictures_is_refused_in_the_plan() -> None:
    ((role, code, _, _, warning),) = _advice("unclip", "unet", "text_encoder", "vae")
    assert (role, code, warning) == ("on", "image_encoder", False)
    assert _advice("unclip", "unet", "text_encoder", "vae", "image_encoder") == []


def test_pictures_to_be_kept_beside_are_refused_in_the_plan() -> None:
    ((role, _, _, _, warning),) = _advice("unclip", "unet", "image_encoder", prior="others")
    assert (role, warning) == ("prior", False)


# -- on a base that can draw -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base() -> Taken:
    return take(BASES / "unclip")


def drawn(folder: Path, first: int) -> Given:
    """Return two drawings of one held-out combination."""
    combinations = draw_combinations(11 + first, held_out=True)
    shown = next(combinations)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        draw(shown, FLAT, 7_000_000 + 10 * first + i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("")
    return dataset(folder)


@torch.no_grad()
def loss_of(diffusion: Diffusion, latents_BCHW: Tensor, told: Conditioning) -> float:
    """Return the loss at fixed timesteps and noises, mean over 2 pictures and 12 timesteps."""
    draw_ = torch.Generator().manual_seed(5)
    total = 0.0
    for timestep in range(300, 1000, 60):
        timesteps = torch.full((len(latents_BCHW),), timestep)
        noise = torch.randn(latents_BCHW.shape, generator=draw_)
        noisy = diffusion.schedule.add_noise(latents_BCHW, noise, timesteps)
        predicted = diffusion.predict(noisy, timesteps, told.take([0] * len(latents_BCHW)))
        total += float((predicted - noise).square().mean())
    return total / 12


def test_what_is_found_is_nearer_than_what_the_encoder_says(base: Taken, tmp_path: Path) -> None:
    """found ≤ ē < nothing < another picture's, at noises that the training did not see; no weight moved for it."""
    diffusion = loaded(base)
    weights = {name: digest(tensor) for name, tensor in diffusion.unet.state_dict().items()}
    given, other = drawn(tmp_path / "a", 0), drawn(tmp_path / "b", 1)
    wanted = order(tmp_path / "work", "clip_inversion", base, given, steps=24, batch=4, warmup=2, noise_from=300)
    outcome = train(wanted)
    found = load_file(tmp_path / "work" / outcome.pack)["image_embedding.image_embeds"]
    planned = plan_pictures(given.pictures, diffusion.resolution, buckets=True)
    latents = torch.cat([diffusion.encode_picture(read_pixels(p, flip=False)) for p in planned])
    mean_1D, other_1D = mean_embedding(diffusion, given), mean_embedding(diffusion, other)
    best, encoded, wrong = (
        loss_of(diffusion, latents, diffusion.imagine(image)) for image in (found, mean_1D, other_1D)
    )
    nothing = loss_of(diffusion, latents, diffusion.encode_negative([""]))
    assert best < encoded < nothing < wrong
    assert 0.5 < float(torch.cosine_similarity(found, mean_1D)) < 1
    assert {name: digest(tensor) for name, tensor in diffusion.unet.state_dict().items()} == weights


def test_samples_on_the_way_are_drawn_from_what_has_been_found(
    on: Taken, pictures: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions are not read; prompts that somebody wants are heard where a family hears any."""
    monkeypatch.setattr("sdforge.run.watch.SAMPLE_STEPS", 1)
    far: dict[str, Any] = {"steps": 1, "learning_rate": 1.0, "how": {"samples": {"steps": 1}}}
    rows = invert(tmp_path, on, pictures, **far)[0].record["samples"]
    assert [row[:2] for row in rows] == [[0, ""], [1, ""]]
    assert len({Image.open(path).tobytes() for _, _, path in rows}) == 2
    wish = {"samples": {"steps": 1, "prompts": ["a house"]}}
    said = invert(tmp_path / "wish", on, pictures, steps=1, how=wish)[0].record["samples"]
    assert {row[1] for row in said} == {"a house" if loaded(on).text_encoders else ""}
