"""Diffusion's schedule and targets, as functions of tensors.

Shapes in names: B pictures of a batch, C channels, H and W of the latent. Timesteps count from 0 to 999.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 1000


@dataclass(frozen=True)
class Schedule:
    """How much of a picture is left at every timestep: alphas_T, the products ᾱ_t (Ho et al. 2020), fp32.

    prediction: `epsilon`, `v_prediction` (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512), or `flow` (rectified
    flow, Esser et al. 2024, https://arxiv.org/abs/2403.03206), for which alphas_T holds (1 − σ_t)², σ_t = (t + 1) / T.
    """

    alphas_T: Tensor
    prediction: str

    def to(self, device: torch.device) -> Schedule:
        return Schedule(self.alphas_T.to(device), self.prediction)

    def _signal_and_noise(self, timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
        alphas_B111 = self.alphas_T[timesteps_B][:, None, None, None]
        signal = alphas_B111.sqrt()
        return signal, 1 - signal if self.prediction == "flow" else (1 - alphas_B111).sqrt()

    def add_noise(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """Return √ᾱ z + √(1−ᾱ) ε; for flow (1−σ) z + σ ε."""
        signal, noise = self._signal_and_noise(timesteps_B)
        return signal * latents_BCHW + noise * noise_BCHW

    def target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """Return what the U-Net should predict: ε, v = √ᾱ ε − √(1−ᾱ) z, or the flow ε − z."""
        if self.prediction == "epsilon":
            return noise_BCHW
        if self.prediction == "flow":
            return noise_BCHW - latents_BCHW
        signal, noise = self._signal_and_noise(timesteps_B)
        return signal * noise_BCHW - noise * latents_BCHW

    def snr(self, timesteps_B: Tensor) -> Tensor:
        """Return the signal-to-noise ratio ᾱ / (1 − ᾱ)."""
        alphas_B = self.alphas_T[timesteps_B]
        return alphas_B / (1 - alphas_B)

    def min_snr_weight(self, timesteps_B: Tensor, gamma: float) -> Tensor:
        """Return min(SNR, γ)/SNR for ε, min(SNR, γ)/(SNR + 1) for v (Hang et al. 2023, §3.4).

        γ 0 and flow: no weighting.
        """
        if gamma == 0 or self.prediction == "flow":
            return torch.ones_like(timesteps_B, dtype=torch.float32)
        snr_B = self.snr(timesteps_B).clamp_min(1e-8)
        return snr_B.clamp_max(gamma) / (snr_B if self.prediction == "epsilon" else snr_B + 1)


def scaled_linear(beta_start: float, beta_end: float, prediction: str, *, zero_terminal_snr: bool = False) -> Schedule:
    """Return Stable Diffusion's schedule: √β linear from √beta_start to √beta_end over 1000 steps.

    zero_terminal_snr: shift and scale √ᾱ so that nothing is left of the picture at the last step (Lin et al. 2023,
    https://arxiv.org/abs/2305.08891, algorithm 1).
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, STEPS, dtype=torch.float64) ** 2
    roots = (1 - betas).cumprod(0).sqrt()
    if zero_terminal_snr:
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return Schedule((roots**2).float(), prediction)


def rectified_flow() -> Schedule:
    """Return the straight path from picture to noise, σ from 1/1000 to 1."""
    sigmas = torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS
    return Schedule(((1 - sigmas) ** 2).float(), "flow")
