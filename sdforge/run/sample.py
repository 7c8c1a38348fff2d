"""Sampling: DPM-Solver++ 2M (Lu et al. 2022, https://arxiv.org/abs/2211.01095) with classifier-free guidance."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdforge.run.diffusion import Conditioning, Diffusion, Framing
from sdforge.run.noise import STEPS, Schedule
from sdforge.sampler import SETTINGS


class Wish(NamedTuple):
    """A picture to draw. resolution: the edge in pixels; guidance 1: none; clip_skip: layers left out at the end."""

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance: float
    resolution: int
    clip_skip: int = 0


@torch.no_grad()
def sample(diffusion: Diffusion, wishes: list[Wish], images_BD: Tensor | None = None) -> Tensor:
    """Return pictures (B, 3, H, W) in −1 … 1. All wishes share steps, guidance, resolution and clip skip.

    images_BD: embeddings of pictures, one for each wish, for a family that draws from them; default: what is shown.
    """
    first, device = wishes[0], diffusion.device
    scheduler = solver(diffusion.schedule)
    scheduler.set_timesteps(first.steps, device=device)
    edge = first.resolution // 8
    # every picture has noise of its own, so that it does not depend on what it is drawn beside
    noise = [torch.randn(1, 4, edge, edge, generator=torch.Generator().manual_seed(wish.seed)) for wish in wishes]
    latents_BCHW = torch.cat(noise).to(device)
    prompts, whole = [wish.prompt for wish in wishes], (first.resolution, first.resolution)
    sizes: list[Framing] = [(whole, (0, 0), whole)] * len(wishes)
    if images_BD is None and diffusion.shown_1D is not None:
        images_BD = diffusion.shown_1D.expand(len(wishes), -1)
    if images_BD is None:
        positive = diffusion.sized(diffusion.encode_text(prompts, clip_skip=first.clip_skip), sizes)
    else:
        positive = diffusion.sized(diffusion.imagine(images_BD, prompts, clip_skip=first.clip_skip), sizes)
    guided = first.guidance != 1 and diffusion.guided
    if guided:
        negative = diffusion.encode_negative([wish.negative_prompt for wish in wishes], clip_skip=first.clip_skip)
        both = Conditioning.stack([diffusion.sized(negative, sizes), positive])
    for timestep in scheduler.timesteps:
        timesteps_B = timestep.expand(len(wishes))
        if guided:
            pair = diffusion.predict(latents_BCHW.repeat(2, 1, 1, 1), timesteps_B.repeat(2), both)
            away, towards = pair.chunk(2)
            predicted = away + first.guidance * (towards - away)
        else:
            predicted = diffusion.predict(latents_BCHW, timesteps_B, positive)
        latents_BCHW = scheduler.step(predicted, timestep, latents_BCHW, return_dict=False)[0]
    return torch.cat([diffusion.decode_picture(latents_BCHW[i : i + 1]) for i in range(len(wishes))])


def solver(schedule: Schedule) -> Any:
    """Return diffusers' DPM-Solver++ 2M for a schedule."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        num_train_timesteps=STEPS,
        trained_betas=_betas(schedule.alphas_T.cpu()),
        prediction_type=schedule.prediction,
        **SETTINGS,
    )


def _betas(alphas_T: Tensor) -> list[float]:
    """Return the β of a schedule; a last ᾱ of zero is kept a little above it, where the solver can divide."""
    alphas = alphas_T.double().clamp_min(1e-8)
    ratios = torch.cat([alphas[:1], alphas[1:] / alphas[:-1]])
    return [float(beta) for beta in 1 - ratios]
