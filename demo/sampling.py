"""Prompts to pictures: DPM-Solver++(2M) with classifier-free guidance, on bare modules.

Shapes in names: B pictures, C H W of scaled latents (4, 16, 16), L tokens (77), D width of the text (64).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from demo.bases import BETA_END, BETA_START, LATENT_CHANNELS, SCALING_FACTOR, TRAIN_STEPS, Base
from demo.geometry import CELLS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

# Beyond this many pictures at once a CPU gains nothing.
BATCH = 16


@dataclass(frozen=True)
class Sampler:
    """How to draw."""

    steps: int = 12
    guidance: float = 4.5


def alphas_cumprod() -> Tensor:
    """Return ᾱ (1000,), the share of signal variance at each timestep of Stable Diffusion's scaled-linear schedule."""
    betas_T = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS, dtype=torch.float64).square()
    alphas_T: Tensor = (1 - betas_T).cumprod(dim=0).float()
    return alphas_T


def trailing_timesteps(steps: int) -> list[int]:
    """Evenly spaced timesteps from 999 down; they begin at full noise, as the initial latents do."""
    return [round(TRAIN_STEPS - step * TRAIN_STEPS / steps) - 1 for step in range(steps)]


@torch.no_grad()
def encode_prompts(base: Base, prompts: Sequence[str]) -> Tensor:
    """Text states (B, 77, 64)."""
    target = next(base.unet.parameters()).device
    states: Tensor = base.text_encoder(torch.tensor(base.tokenizer.ids(prompts), device=target)).last_hidden_state
    return states


@torch.no_grad()
def sample(base: Base, text_BLD: Tensor, seeds: Sequence[int], sampler: Sampler) -> Tensor:
    """Scaled latents; each picture's noise comes from its own seed, so batches do not matter."""
    target = text_BLD.device
    noise = [torch.randn(LATENT_CHANNELS, CELLS, CELLS, generator=torch.Generator().manual_seed(s)) for s in seeds]
    both_BLD = torch.cat([encode_prompts(base, [""]).expand_as(text_BLD), text_BLD])

    def predict(noisy_BCHW: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        time_B = torch.full((len(both_BLD),), timestep, device=target)
        empty, prompted = base.unet(torch.cat([noisy_BCHW, noisy_BCHW]), time_B, both_BLD).sample.chunk(2)
        return empty, prompted

    return solve(predict, torch.stack(noise).to(target), sampler)


def solve(predict: Callable[[Tensor, int], tuple[Tensor, Tensor]], noise_BCHW: Tensor, sampler: Sampler) -> Tensor:
    """Go from noise to scaled latents; predict: (noisy latents, timestep) → noise without and with the prompt.

    DPM-Solver++(2M), algorithm 2 of Lu et al. 2022 (https://arxiv.org/abs/2211.01095), in the space x = z / sqrt(ᾱ)
    with sigma = sqrt((1 - ᾱ) / ᾱ), where the exponential integrator is a plain interpolation.
    """
    timesteps = trailing_timesteps(sampler.steps)
    alphas = alphas_cumprod()[timesteps]
    sigmas = [*((1 - alphas) / alphas).sqrt().tolist(), 0.0]
    x_BCHW = noise_BCHW * (sigmas[0] ** 2 + 1) ** 0.5
    before_BCHW = x_BCHW
    for index, timestep in enumerate(timesteps):
        sigma, following = sigmas[index], sigmas[index + 1]
        empty, prompted = predict(x_BCHW / (sigma**2 + 1) ** 0.5, timestep)
        clean_BCHW = x_BCHW - sigma * (empty + sampler.guidance * (prompted - empty))
        guess_BCHW = clean_BCHW
        if index and following:  # the first step has no predecessor, the last goes to the clean picture itself
            step, last_step = math.log(sigma / following), math.log(sigmas[index - 1] / sigma)
            guess_BCHW = clean_BCHW + (clean_BCHW - before_BCHW) * step / (2 * last_step)
        ratio = following / sigma
        x_BCHW = ratio * x_BCHW + (1 - ratio) * guess_BCHW
        before_BCHW = clean_BCHW
    return x_BCHW


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> list[Image.Image]:
    """RGB pictures of scaled latents."""
    drawn = vae.decode(latents / SCALING_FACTOR).sample.clamp(-1, 1)
    pixels = ((drawn + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def draw_prompts(base: Base, prompts: Sequence[str], seeds: Sequence[int], sampler: Sampler) -> list[Image.Image]:
    """One 128×128 picture for each prompt and its seed."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        text = encode_prompts(base, prompts[start : start + BATCH])
        pictures += decode(base.vae, sample(base, text, seeds[start : start + BATCH], sampler))
    return pictures
