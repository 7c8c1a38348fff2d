"""Image embeddings and aesthetics while pictures are drawn: by our networks, and by diffusers' pipelines alike."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sdforge.errors import UsageError
from sdforge.run.diffusion import Diffusion
from sdforge.run.preset import _let_skip
from sdforge.run.sample import Wish, sample
from sdforge.run.steering import Aesthetic, cosines
from sdforge.sidecars import aesthetic, image_embedding
from tests.families.toys import write_family
from tests.families.workbench import Taken, digest, take, write_toy

CPU = torch.device("cpu")
STEERING = {"steps": 4, "learning_rate": 1e-2, "prompts": ["a red cat"]}


def loaded(taken: Taken) -> Diffusion:
    load = importlib.import_module(f"sdforge.families.{taken.artifact.family}.load").load
    found: Diffusion = load(taken.given(), CPU, torch.float32)
    return found


def shown(seed: int = 0) -> dict[str, Tensor]:
    return {"image_embeds": torch.randn(1, 12, generator=torch.Generator().manual_seed(seed))}


def steering() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(4)
    return {"vector": torch.randn(12, generator=draw), "text_projection": torch.randn(12, 16, generator=draw)}


def wish(prompt: str) -> Wish:
    return Wish(prompt, "", 1, 2, 3.0, 64)


@pytest.mark.parametrize("name", ["unclip", "image_variations"])
def test_what_is_attached_is_drawn_until_it_is_taken_off(name: str, toys: Path) -> None:
    diffusion, wishes = loaded(take(write_family(toys / name, name))), [wish(""), wish("")]
    before = sample(diffusion, wishes)
    wanted = sample(diffusion, wishes, shown()["image_embeds"].expand(2, -1))
    take_off = image_embedding.attach(diffusion, shown(), {"level": 0})
    assert torch.equal(sample(diffusion, wishes), wanted)
    take_off()
    assert torch.equal(sample(diffusion, wishes), before)
    assert not torch.equal(before, wanted)


def test_layers_are_left_out_of_the_prompt_beside_a_picture_too(toys: Path) -> None:
    diffusion, image_1D = loaded(take(write_family(toys / "unclip", "unclip"))), shown()["image_embeds"]
    said = diffusion.imagine(image_1D, ["a red cat"], clip_skip=1)
    assert torch.equal(said.hidden_BLD, diffusion.encode_text(["a red cat"], clip_skip=1).hidden_BLD)
    one = wish("a red cat")._replace(guidance=1.0)
    drawn_with = [sample(diffusion, [one._replace(clip_skip=skip)], image_1D) for skip in (0, 1)]
    assert not torch.equal(*drawn_with)


def test_an_embedding_is_nothing_to_a_checkpoint_of_words(toy: Taken) -> None:
    with pytest.raises(UsageError, match="draws from words"):
        image_embedding.attach(loaded(toy), shown(), {})


def pipeline_of(folder: Path, kind: Any) -> Any:
    pipeline = kind.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: Any, count: int = 1, **more: Any) -> Tensor:
    """Draw from the same latents, whatever else random numbers are drawn for."""
    latents = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    found: Tensor = pipeline(
        guidance_scale=3.0, num_inference_steps=2, latents=latents, output_type="pt", height=64, width=64, **more
    ).images
    return found


def test_a_pipeline_that_is_shown_pictures_takes_the_embedding_by_default(toys: Path) -> None:
    """As diffusers draws with `image_embeds`, but for the noise, which it adds at level 0 too and never the same."""
    folder = write_family(toys / "unclip", "unclip")
    pipeline = pipeline_of(folder, diffusers.StableUnCLIPImg2ImgPipeline)
    image_1D = shown()["image_embeds"]
    near = drawn(pipeline, prompt="a red cat", image_embeds=image_1D)
    image_embedding.attach_pipeline(pipeline, shown(), {"level": 0})
    once, twice = (drawn(pipeline, prompt="a red cat") for _ in range(2))
    assert torch.equal(once, twice)
    other = drawn(pipeline, prompt="a red cat", image_embeds=shown(1)["image_embeds"])
    assert (once - near).abs().mean() < 0.3 * (once - other).abs().mean()
    assert drawn(pipeline, 2, prompt=["a red cat", "a house"]).shape[0] == 2
    assert type(pipeline).__name__ == "StableUnCLIPImg2ImgPipeline"


def test_what_a_pipeline_is_told_is_what_our_network_is_told(toys: Path) -> None:
    folder = write_family(toys / "unclip", "unclip")
    pipeline, diffusion = pipeline_of(folder, diffusers.StableUnCLIPImg2ImgPipeline), loaded(take(folder))
    image_embedding.attach_pipeline(pipeline, shown(), {"level": 0})
    theirs = pipeline.noise_image_embeddings(shown()["image_embeds"], torch.tensor([0]))
    ours = diffusion.imagine(shown()["image_embeds"]).added["class_labels"]
    assert torch.allclose(theirs, ours, atol=1e-5)


def test_a_pipeline_of_variations_takes_the_embedding_by_default(toys: Path) -> None:
    folder = write_family(toys / "image_variations", "image_variations")
    pipeline = pipeline_of(folder, diffusers.StableDiffusionImageVariationPipeline)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    before = drawn(pipeline, image=picture)
    image_embedding.attach_pipeline(pipeline, shown(), {})
    assert torch.equal(drawn(pipeline, image=picture), before)
    once = drawn(pipeline)
    assert not torch.allclose(once, before, atol=1e-3)
    with torch.no_grad():
        embeds = pipeline.image_encoder(picture).image_embeds
    image_embedding.attach_pipeline(pipeline, {"image_embeds": embeds}, {})
    assert torch.allclose(drawn(pipeline), before, atol=1e-5)


def test_another_pipeline_is_refused(toys: Path) -> None:
    pipeline = pipeline_of(write_toy(toys / "toy", seed=1), diffusers.StableDiffusionPipeline)
    with pytest.raises(UsageError, match="draws from words"):
        image_embedding.attach_pipeline(pipeline, shown(), {})


def states(diffusion: Diffusion) -> dict[str, str]:
    return {n: digest(t) for n, t in diffusion.text_encoders["text_encoder"].state_dict().items()}


def test_every_prompt_is_steered_by_itself_and_the_other_side_never(toy: Taken) -> None:
    diffusion, texts = loaded(toy), ["a red cat", "", "a house"]
    encoder, before = diffusion.text_encoders["text_encoder"], states(loaded(toy))
    towards = Aesthetic.of(steering(), STEERING)
    plain, negative = diffusion.encode_text(texts), diffusion.encode_negative(["a house"])
    with torch.no_grad():
        cosine = cosines(encoder, diffusion.token_ids(texts, "text_encoder"), diffusion.words.end, towards)
    take_off = aesthetic.attach(diffusion, steering(), STEERING)
    said = diffusion.encode_text(texts).hidden_BLD
    assert torch.equal(said[1], plain.hidden_BLD[1])
    ends = (diffusion.token_ids(texts, "text_encoder") == diffusion.words.end).int().argmax(1)
    after = torch.cosine_similarity(said[range(3), ends] @ towards.projection_DW.T, towards.vector_D[None])
    assert bool((after[[0, 2]] > cosine[[0, 2]] + 0.05).all())
    assert torch.equal(diffusion.encode_text(["a house"]).hidden_BLD[0], said[2])
    assert torch.equal(diffusion.encode_negative(["a house"]).hidden_BLD, negative.hidden_BLD)
    assert states(diffusion) == before
    take_off()
    assert torch.equal(diffusion.encode_text(texts).hidden_BLD, plain.hidden_BLD)


def test_a_pipeline_says_what_our_network_says(toy: Taken, toys: Path) -> None:
    pipeline = pipeline_of(toys / "toy", diffusers.StableDiffusionPipeline)
    _let_skip(pipeline)
    diffusion = loaded(toy)
    aesthetic.attach(diffusion, steering(), STEERING)
    aesthetic.attach_pipeline(pipeline, steering(), STEERING)
    texts = ["a red cat", ""]
    said, away = pipeline.encode_prompt(texts, CPU, 1, True)
    assert torch.allclose(said, diffusion.encode_text(texts).hidden_BLD, atol=1e-5)
    assert torch.allclose(away, diffusion.encode_negative(["", ""]).hidden_BLD, atol=1e-5)
    without_its_last, _ = pipeline.encode_prompt(texts, CPU, 1, True, clip_skip=1)
    assert torch.allclose(without_its_last, diffusion.encode_text(texts, clip_skip=1).hidden_BLD, atol=1e-5)
    assert drawn(pipeline, prompt="a red cat").shape[0] == 1


def test_two_text_encoders_are_not_steered(toys: Path) -> None:
    with pytest.raises(UsageError, match="one text encoder"):
        aesthetic.attach(loaded(take(write_family(toys / "sdxl", "sdxl"))), steering(), STEERING)
