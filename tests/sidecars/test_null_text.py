"""Drawing with what null-text inversion found: our networks, a stock pipeline of diffusers, and the file between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor

from sdforge.errors import UsageError
from sdforge.families.sd15.load import load
from sdforge.families.sdxl.load import load as load_sdxl
from sdforge.formats.null_text import null_text_metadata
from sdforge.run.noise import scaled_linear
from sdforge.sidecars.null_text import attach_pipeline, replay, replay_latents
from tests.families.toys import write_family
from tests.families.workbench import Taken, take

FACTS: dict[str, Any] = {
    "prompt": "a red cat",
    "guidance": 4.0,
    "steps": 5,
    "resolution": 64,
    "spacing": "leading",
}


@pytest.fixture(scope="module")
def found() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "uncond": torch.randn(5, 77, 16, generator=draw).half(),
        "start": torch.randn(1, 4, 8, 8, generator=draw).half(),
    }


@pytest.fixture(scope="module")
def pipeline(toys: Path, toy: Taken) -> Any:
    assert toy
    return StableDiffusionPipeline.from_pretrained(toys / "toy", dtype=torch.float32)


@pytest.mark.parametrize("prompt", [None, "a house"])
def test_a_stock_pipeline_draws_what_we_draw(
    prompt: str | None, toy: Taken, pipeline: Any, found: dict[str, Tensor]
) -> None:
    ours = load(toy.given(), torch.device("cpu"), torch.float32)
    mine = replay_latents(ours, found, FACTS, prompt)
    draw = attach_pipeline(pipeline, found, FACTS)
    pipeline.set_progress_bar_config(disable=True)
    theirs = draw(prompt, output_type="latent").images
    assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3 * float(mine.abs().max()))
    pixels = replay(ours, found, FACTS, prompt)
    assert pixels.shape == (1, 3, 64, 64)


def test_a_pipeline_with_two_text_encoders_draws_what_we_draw(toys: Path) -> None:
    """Also a picture that is no square: the sizes that it is told are those of the search."""
    folder, draw = write_family(toys / "sdxl", "sdxl"), torch.Generator().manual_seed(0)
    tensors = {"uncond": torch.randn(5, 77, 40, generator=draw), "start": torch.randn(1, 4, 8, 16, generator=draw)}
    mine = replay_latents(load_sdxl(take(folder).given(), torch.device("cpu"), torch.float32), tensors, FACTS)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = attach_pipeline(pipeline, tensors, FACTS)(output_type="latent").images
    assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3 * float(mine.abs().max()))


def test_a_schedule_that_ends_in_pure_noise_is_kept(pipeline: Any, found: dict[str, Tensor]) -> None:
    seen: list[Tensor] = []
    before = pipeline.scheduler
    pipeline.scheduler = DDIMScheduler.from_config(before.config, rescale_betas_zero_snr=True)
    hook = pipeline.unet.register_forward_hook(lambda *_: seen.append(pipeline.scheduler.alphas_cumprod))
    attach_pipeline(pipeline, found, FACTS)(output_type="latent")
    hook.remove()
    pipeline.scheduler = before
    wanted = scaled_linear(0.00085, 0.012, "epsilon", zero_terminal_snr=True).alphas_T
    assert torch.allclose(seen[0][:-1], wanted[:-1], atol=1e-5)


def test_every_empty_prompt_counts_and_the_pipeline_stays_as_it_was(pipeline: Any, found: dict[str, Tensor]) -> None:
    before = pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config)
    drawn = attach_pipeline(pipeline, found, FACTS)(output_type="latent").images
    assert pipeline.scheduler is before
    for step in range(5):
        changed = found["uncond"].clone()
        changed[step] += 1
        other = attach_pipeline(pipeline, found | {"uncond": changed}, FACTS)(output_type="latent").images
        assert not torch.allclose(drawn, other), step


def test_a_file_says_all_that_drawing_needs(found: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(found, tmp_path / "face.safetensors", null_text_metadata("sd15", FACTS))
    taken = take(tmp_path / "face.safetensors")
    assert (taken.artifact.kind, taken.artifact.family, taken.artifact.facts) == ("null_text", "sd15", FACTS)
    assert torch.equal(taken.tensors("null_text")["uncond"], found["uncond"])


@pytest.mark.parametrize(
    ("facts", "lost", "words"),
    [
        ({"prompt": "a"}, "", "does not say with which prompt"),
        (FACTS | {"steps": 7}, "", "no empty prompt for each of its steps"),
        (FACTS, "start", "no latents to start from"),
    ],
)
def test_a_file_that_cannot_be_drawn_with_is_refused(
    facts: dict[str, Any], lost: str, words: str, found: dict[str, Tensor], tmp_path: Path
) -> None:
    parts = {name: tensor for name, tensor in found.items() if name != lost}
    save_file(parts, tmp_path / "face.safetensors", null_text_metadata("sd15", facts))
    with pytest.raises(UsageError, match=words):
        take(tmp_path / "face.safetensors")
