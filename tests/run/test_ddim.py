"""DDIM: our steps are those of diffusers' schedulers, there and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from torch import Tensor

from sdforge.run.ddim import DDIM, SETTINGS
from sdforge.run.noise import scaled_linear

LATENTS, PREDICTED = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
CONFIG: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def both(prediction: str, steps: int, kind: Any = DDIMScheduler) -> tuple[DDIM, Any]:
    """Our DDIM and diffusers' scheduler, with one table of ᾱ: theirs is summed up in fp32."""
    ours = DDIM(scaled_linear(0.00085, 0.012, prediction), steps)
    settings = {key: value for key, value in SETTINGS.items() if key in kind().config}
    theirs = kind(**CONFIG, **settings, prediction_type=prediction)
    assert float((theirs.alphas_cumprod - ours.schedule.alphas_T).abs().max()) < 1e-6
    theirs.alphas_cumprod = ours.schedule.alphas_T
    theirs.final_alpha_cumprod = theirs.initial_alpha_cumprod = ours.schedule.alphas_T[0]
    theirs.set_timesteps(steps)
    return ours, theirs


@pytest.mark.parametrize("steps", [1, 7, 20, 50, 500])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_step_is_diffusers_step(prediction: str, steps: int) -> None:
    ours, theirs = both(prediction, steps)
    assert ours.timesteps == theirs.timesteps.tolist()
    for timestep in (ours.timesteps[0], ours.timesteps[len(ours.timesteps) // 2], ours.timesteps[-1]):
        expected = theirs.step(PREDICTED, timestep, LATENTS, eta=0.0).prev_sample
        assert torch.allclose(ours.step(LATENTS, PREDICTED, timestep), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_way_back_is_diffusers_way_back(prediction: str) -> None:
    ours, theirs = both(prediction, 20, DDIMInverseScheduler)
    assert ours.timesteps[::-1] == theirs.timesteps.tolist()
    mine = expected = LATENTS
    for timestep in reversed(ours.timesteps):
        mine = ours.back(mine, _network(mine, timestep), timestep)
        expected = theirs.step(_network(expected, timestep), timestep, expected).prev_sample
    assert torch.allclose(mine, expected, rtol=1e-5, atol=1e-5)


def _network(noisy_BCHW: Tensor, timestep: int) -> Tensor:
    return (noisy_BCHW * 0.7 + timestep / 1000).tanh()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_there_and_back_with_one_prediction_is_where_it_began(prediction: str) -> None:
    ours, _ = both(prediction, 20)
    noise = torch.randn(LATENTS.shape, generator=torch.Generator().manual_seed(1))

    def predicted(latents: Tensor, alpha: Tensor) -> Tensor:
        if prediction == "epsilon":
            return noise
        clean = (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean

    timestep = ours.timesteps[8]
    before, alphas = timestep - 50, ours.schedule.alphas_T
    there = ours.back(LATENTS, predicted(LATENTS, alphas[before]), timestep)
    assert torch.allclose(ours.step(there, predicted(there, alphas[timestep]), timestep), LATENTS, atol=1e-4)
