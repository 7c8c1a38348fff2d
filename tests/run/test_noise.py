"""The noise schedule and its targets, against diffusers and the papers' equations."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor

from sdforge.run.noise import STEPS, Schedule, rectified_flow, scaled_linear

BETAS = 0.00085, 0.012
PREDICTIONS = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
T = torch.tensor([0, 1, 250, 500, 998, 999])


def pair() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(6, 4, 2, 2, generator=draw) for _ in range(2))
    return latents, noise


def stock(prediction: str) -> DDIMScheduler:
    start, end = BETAS
    return DDIMScheduler(beta_start=start, beta_end=end, beta_schedule="scaled_linear", prediction_type=prediction)


def test_the_schedule_is_that_of_diffusers() -> None:
    ours = scaled_linear(*BETAS, "epsilon").alphas_T
    assert ours.shape == (STEPS,)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, stock("epsilon").alphas_cumprod, rtol=1e-5)


def test_what_is_known_of_stable_diffusions_schedule() -> None:
    alphas = scaled_linear(*BETAS, "epsilon").alphas_T
    assert float(alphas[0]) == pytest.approx(1 - 0.00085, abs=1e-7)
    assert float(alphas[-1]) == pytest.approx(0.004660, abs=1e-6)
    assert bool((alphas.diff() < 0).all())


def test_nothing_is_left_at_the_last_step_of_a_zero_terminal_schedule() -> None:
    plain = scaled_linear(*BETAS, "v_prediction").alphas_T
    zero = scaled_linear(*BETAS, "v_prediction", zero_terminal_snr=True).alphas_T
    assert float(zero[-1]) == 0
    assert float(zero[0]) == float(plain[0])
    theirs = (1 - rescale_zero_terminal_snr(stock("epsilon").betas)).cumprod(0)
    assert torch.allclose(zero, theirs, atol=1e-5)


@PREDICTIONS
def test_noise_and_targets_are_those_of_diffusers(prediction: str) -> None:
    schedule, theirs = scaled_linear(*BETAS, prediction), stock(prediction)
    latents, noise = pair()
    assert torch.allclose(schedule.add_noise(latents, noise, T), theirs.add_noise(latents, noise, T), atol=1e-5)
    target = noise if prediction == "epsilon" else theirs.get_velocity(latents, noise, T)
    assert torch.allclose(schedule.target(latents, noise, T), target, atol=1e-5)


def test_signal_and_noise_share_one_unit_of_variance() -> None:
    schedule, one, none = scaled_linear(*BETAS, "epsilon"), torch.ones(6, 1, 1, 1), torch.zeros(6, 1, 1, 1)
    signal, noise = schedule.add_noise(one, none, T), schedule.add_noise(none, one, T)
    assert torch.allclose(signal**2 + noise**2, one)


def test_snr_is_signal_over_noise() -> None:
    schedule = Schedule(torch.tensor([0.9, 0.5, 0.1]), "epsilon")
    assert schedule.snr(torch.tensor([0, 1, 2])).tolist() == pytest.approx([9, 1, 1 / 9])


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("epsilon", [5 / 9, 1, 1]), ("v_prediction", [5 / 10, 1 / 2, (1 / 9) / (10 / 9)])],
)
def test_min_snr_weights_are_those_of_the_paper(prediction: str, expected: list[float]) -> None:
    """Hang et al. 2023, §3.4, with γ = 5 and SNR 9, 1, 1/9."""
    schedule = Schedule(torch.tensor([0.9, 0.5, 0.1]), prediction)
    assert schedule.min_snr_weight(torch.tensor([0, 1, 2]), 5.0).tolist() == pytest.approx(expected)


@PREDICTIONS
def test_gamma_zero_weighs_all_alike(prediction: str) -> None:
    weights = scaled_linear(*BETAS, prediction).min_snr_weight(T, 0.0)
    assert weights.tolist() == [1.0] * 6


@PREDICTIONS
def test_weights_are_finite_where_nothing_is_left_of_the_picture(prediction: str) -> None:
    schedule = scaled_linear(*BETAS, prediction, zero_terminal_snr=True)
    assert bool(torch.isfinite(schedule.min_snr_weight(T, 5.0)).all())


def test_flow_goes_straight_from_picture_to_noise() -> None:
    """Esser et al. 2024, equations 1 and 2: z_t = (1 − t) x + t ε, and the target is ε − x wherever one is."""
    schedule = rectified_flow()
    latents, noise = pair()
    sigma = ((T + 1) / STEPS)[:, None, None, None]
    noisy = schedule.add_noise(latents, noise, T)
    assert torch.allclose(noisy, (1 - sigma) * latents + sigma * noise, atol=1e-6)
    assert torch.equal(schedule.target(latents, noise, T), noise - latents)
    assert torch.equal(noisy[-1], noise[-1])


def test_flow_is_not_weighted_by_snr() -> None:
    assert rectified_flow().min_snr_weight(T, 5.0).tolist() == [1.0] * len(T)
