"""Sampling: DPM-Solver++ 2M as diffusers' pipeline runs it, from noise of every picture's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from torch import Tensor

from sdforge.families.sd15.load import load
from sdforge.run.diffusion import Conditioning, Diffusion
from sdforge.run.sample import Wish, sample
from tests.families.workbench import Taken

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ours(toy: Taken) -> Diffusion:
    return load(toy.given(), CPU, torch.float32)


@pytest.mark.parametrize(("guidance", "prediction"), [(5.0, "epsilon"), (1.0, "epsilon"), (4.0, "v_prediction")])
def test_a_picture_is_what_diffusers_pipeline_draws(guidance: float, prediction: str, toy: Taken, toys: Path) -> None:
    stock: Any = StableDiffusionPipeline.from_pretrained(toys / "toy", dtype=torch.float32)
    stock.scheduler = DPMSolverMultistepScheduler.from_config(
        stock.scheduler.config,
        algorithm_type="dpmsolver++",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        prediction_type=prediction,
    )
    stock.set_progress_bar_config(disable=True)
    given = toy.given()
    mine = load(dataclasses.replace(given, facts=given.facts | {"prediction": prediction}), CPU, torch.float32)
    found = sample(mine, [Wish("a red cat", "a house", 5, 4, guidance, 64)])
    theirs = stock(
        "a red cat",
        negative_prompt="a house",
        num_inference_steps=4,
        guidance_scale=guidance,
        latents=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)),
        output_type="pt",
    ).images
    assert torch.allclose((found / 2 + 0.5).clamp(0, 1), theirs, atol=2e-4)


def test_a_perfect_prediction_ends_at_the_picture(ours: Diffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that always knows z₀ leads there from any noise, in any number of steps."""
    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def predict(noisy_BCHW: Tensor, timesteps_B: Tensor, condition: Conditioning) -> Tensor:
        assert len(condition.hidden_BLD) == len(noisy_BCHW)
        alphas = ours.schedule.alphas_T[timesteps_B][:, None, None, None]
        return (noisy_BCHW - alphas.sqrt() * clean) / (1 - alphas).sqrt()

    monkeypatch.setattr(ours, "predict", predict)
    for steps in (1, 2, 7):
        found = sample(ours, [Wish("", "", seed, steps, 1.0, 64) for seed in (1, 2)])
        assert torch.allclose(found, ours.decode_picture(clean).expand(2, -1, -1, -1), atol=1e-3)


def test_guidance_one_asks_once(ours: Diffusion) -> None:
    plain = sample(ours, [Wish("a red cat", "a house", 5, 2, 1.0, 64)])
    other = sample(ours, [Wish("a red cat", "a drawing", 5, 2, 1.0, 64)])
    assert torch.equal(plain, other)


def test_a_picture_may_be_of_another_size(ours: Diffusion) -> None:
    assert sample(ours, [Wish("a red cat", "", 5, 1, 1.0, 128)]).shape == (1, 3, 128, 128)


def test_zero_terminal_snr_gives_finite_pictures(toy: Taken) -> None:
    given = toy.given()
    facts = given.facts | {"prediction": "v_prediction", "zero_terminal_snr": True}
    diffusion = load(dataclasses.replace(given, facts=facts), CPU, torch.float32)
    assert bool(torch.isfinite(sample(diffusion, [Wish("a cat", "", 1, 3, 4.0, 64)])).all())
