"""DDIM without noise (Song et al. 2020, https://arxiv.org/abs/2010.02502, eq. 12), and the same path backwards.

Timesteps are those of Stable Diffusion's own sampler: i · (1000 // steps) + 1 (`leading`, offset 1), and what lies
before the first of them has ᾱ_0. Shapes in names: B pictures, C channels, H W of latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdforge.run.diffusion import Conditioning, Diffusion
from sdforge.run.noise import STEPS, Schedule

SPACING = "leading"
SETTINGS = {  # what a scheduler of diffusers must be told to take the same steps
    "timestep_spacing": SPACING,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


@dataclass(frozen=True)
class DDIM:
    """So many steps of a schedule that predicts ε or v."""

    schedule: Schedule
    steps: int

    @property
    def timesteps(self) -> list[int]:
        """From much noise to little."""
        return [i * (STEPS // self.steps) + 1 for i in reversed(range(self.steps))]

    def step(self, noisy_BCHW: Tensor, predicted_BCHW: Tensor, timestep: int) -> Tensor:
        """Return the latents one step nearer to the picture."""
        alpha = self.schedule.alphas_T[timestep]
        clean_BCHW, noise_BCHW = self._parts(noisy_BCHW, predicted_BCHW, alpha)
        return _mixed(clean_BCHW, noise_BCHW, self._before(timestep))

    def back(self, noisy_BCHW: Tensor, predicted_BCHW: Tensor, timestep: int) -> Tensor:
        """Return the latents at a timestep from those one step nearer to the picture.

        predicted_BCHW: of the nearer latents, but asked for at this timestep; that is the inversion's approximation.
        """
        clean_BCHW, noise_BCHW = self._parts(noisy_BCHW, predicted_BCHW, self._before(timestep))
        return _mixed(clean_BCHW, noise_BCHW, self.schedule.alphas_T[timestep])

    def _before(self, timestep: int) -> Tensor:
        return self.schedule.alphas_T[max(0, timestep - STEPS // self.steps)]

    def _parts(self, noisy_BCHW: Tensor, predicted_BCHW: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Return (z₀, ε): a v is taken apart first, since steps are made of these two."""
        signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
        if self.schedule.prediction == "v_prediction":
            return signal * noisy_BCHW - noise * predicted_BCHW, signal * predicted_BCHW + noise * noisy_BCHW
        return (noisy_BCHW - noise * predicted_BCHW) / signal, predicted_BCHW


def _mixed(clean_BCHW: Tensor, noise_BCHW: Tensor, alpha: Tensor) -> Tensor:
    return alpha.sqrt() * clean_BCHW + (1 - alpha).sqrt() * noise_BCHW


def predict_at(diffusion: Diffusion, noisy_BCHW: Tensor, timestep: int, condition: Conditioning) -> Tensor:
    """Return the U-Net's prediction for latents that are all at one timestep."""
    timesteps_B = torch.full((noisy_BCHW.shape[0],), timestep, device=noisy_BCHW.device)
    return diffusion.predict(noisy_BCHW, timesteps_B, condition)


@torch.no_grad()
def invert(diffusion: Diffusion, latents_BCHW: Tensor, condition: Conditioning, steps: int) -> list[Tensor]:
    """Return the latents from the picture to noise, `steps` + 1, without guidance (Mokady et al. 2022, §3.1)."""
    ddim = DDIM(diffusion.schedule, steps)
    path = [latents_BCHW]
    for timestep in reversed(ddim.timesteps):
        path.append(ddim.back(path[-1], predict_at(diffusion, path[-1], timestep, condition), timestep))
    return path


@torch.no_grad()
def guide(
    diffusion: Diffusion, start_BCHW: Tensor, towards: Conditioning, away: list[Conditioning], guidance: float
) -> Tensor:
    """Return the latents to which guidance leads from a start; away: its other side, of every step."""
    ddim, latents_BCHW = DDIM(diffusion.schedule, len(away)), start_BCHW
    for timestep, other in zip(ddim.timesteps, away, strict=True):
        # one after the other, as null-text inversion finds them: so the same bits come out
        away_BCHW = predict_at(diffusion, latents_BCHW, timestep, other)
        towards_BCHW = predict_at(diffusion, latents_BCHW, timestep, towards)
        guided_BCHW = away_BCHW + guidance * (towards_BCHW - away_BCHW)
        latents_BCHW = ddim.step(latents_BCHW, guided_BCHW, timestep)
    return latents_BCHW
