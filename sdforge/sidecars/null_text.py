"""Draw with what null-text inversion found: the picture again, or an edit of it by another prompt.

tensors: `uncond` (T, L, D), the empty prompt of every step from much noise to little, and `start` (1, C, H, W).
facts: `prompt`, `guidance`, `steps` of the inversion. Source: Mokady et al. 2022, https://arxiv.org/abs/2211.09794
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdforge.run.ddim import SETTINGS, guide
from sdforge.run.diffusion import Conditioning, Diffusion


def replay(
    diffusion: Diffusion, tensors: dict[str, Tensor], facts: dict[str, Any], prompt: str | None = None
) -> Tensor:
    """Return the picture (1, 3, H, W) in −1 … 1 that a prompt gives, by default the one that it was inverted with."""
    return diffusion.decode_picture(replay_latents(diffusion, tensors, facts, prompt))


@torch.no_grad()
def replay_latents(
    diffusion: Diffusion, tensors: dict[str, Tensor], facts: dict[str, Any], prompt: str | None = None
) -> Tensor:
    """Return the latents of that picture (1, C, H, W), scaled."""
    towards = diffusion.encode_text([facts["prompt"] if prompt is None else prompt])
    added = diffusion.encode_negative([""]).added
    start_BCHW, uncond_TLD = (tensors[name].to(diffusion.device).float() for name in ("start", "uncond"))
    return guide(diffusion, start_BCHW, towards, [Conditioning(u[None], added) for u in uncond_TLD], facts["guidance"])


def plain(diffusion: Diffusion, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same with the ordinary empty prompt at every step: what guidance makes of the start by itself."""
    empty_BLD = diffusion.encode_negative([""]).hidden_BLD
    return tensors | {"uncond": empty_BLD.expand_as(tensors["uncond"])}


def attach_pipeline(pipeline: Any, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Callable[..., Any]:
    """Return `draw(prompt=None, **more)`, which calls a pipeline of diffusers with this start and these empty prompts.

    more: what else the pipeline is to be told (`output_type`, …). The pipeline is left as it was.
    """
    from diffusers import DDIMScheduler

    dtype, device = pipeline.unet.dtype, pipeline.device
    uncond_TLD, start_BCHW = (tensors[name].to(device, dtype) for name in ("uncond", "start"))

    def next_empty_prompt(_: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
        both_BLD = values["prompt_embeds"]
        if step + 1 == len(uncond_TLD):
            return {}
        return {"prompt_embeds": torch.cat([uncond_TLD[step + 1][None], both_BLD[1:]])}

    def draw(prompt: str | None = None, **more: Any) -> Any:
        before, more = pipeline.scheduler, _told_besides(pipeline) | more
        pipeline.scheduler = DDIMScheduler.from_config(before.config, **SETTINGS)
        try:
            return pipeline(
                facts["prompt"] if prompt is None else prompt,
                negative_prompt_embeds=uncond_TLD[:1],
                latents=start_BCHW,
                height=start_BCHW.shape[2] * pipeline.vae_scale_factor,
                width=start_BCHW.shape[3] * pipeline.vae_scale_factor,
                guidance_scale=float(facts["guidance"]),
                num_inference_steps=int(facts["steps"]),
                eta=0.0,
                callback_on_step_end=next_empty_prompt,
                callback_on_step_end_tensor_inputs=["prompt_embeds"],
                **more,
            )
        finally:
            pipeline.scheduler = before

    return draw


def _told_besides(pipeline: Any) -> dict[str, Any]:
    """Return what a pipeline with two text encoders wants to know too: a silent prompt's pooled state, and sizes."""
    second = getattr(pipeline, "text_encoder_2", None)
    if second is None:
        return {}
    edge = pipeline.default_sample_size * pipeline.vae_scale_factor  # as it was told while they were sought
    silent_1D = torch.zeros(1, second.config.projection_dim, dtype=pipeline.unet.dtype, device=pipeline.device)
    return {"negative_pooled_prompt_embeds": silent_1D, "original_size": (edge, edge), "target_size": (edge, edge)}
