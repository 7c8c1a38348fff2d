"""What diffusers makes of the presets: the numbers beside which other programs' are put."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import sdforge

PROMPT = "a drawing of {word} with red hair"
EDGE = 16  # of the latents
TIMESTEP = 500


def latents() -> Tensor:
    return torch.randn(1, 4, EDGE, EDGE, generator=torch.Generator().manual_seed(7))


def measured(pipeline: Any, prompt: str) -> dict[str, Tensor]:
    """Return what a prompt becomes, what noise is seen in latents with it, and what picture latents become."""
    encoded = pipeline.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    found = {"context": encoded[0]}
    more: dict[str, Any] = {}
    if hasattr(pipeline, "text_encoder_2"):
        size = 8.0 * EDGE
        found["pooled"] = encoded[2]
        sizes = torch.tensor([[size, size, 0.0, 0.0, size, size]])
        more = {"added_cond_kwargs": {"text_embeds": encoded[2], "time_ids": sizes}}
    found["noise"] = pipeline.unet(latents(), TIMESTEP, encoder_hidden_states=encoded[0], **more).sample
    return found


@torch.no_grad()
def write_reference(root: Path) -> None:
    """Write `reference.safetensors` into a project whose presets are built."""
    found = {"latents": latents(), "timestep": torch.tensor(float(TIMESTEP))}
    for preset, form in (("plain", "diffusers"), ("forms", "checkpoint"), ("whole", "checkpoint")):
        # a preset's own words are written out by the pipeline: `<mascot>` → `<mascot> <mascot>_1 …`
        pipeline = sdforge.load_preset(root / "out" / preset, form=form)
        prompt = PROMPT.format(word=pipeline.preset["words"][0]["word"])
        if preset == "plain":
            found["moods.noise"] = measured(pipeline, prompt)["noise"]  # its hypernetworks are attached
            found["sigma"] = sigma(pipeline.scheduler)
            found["picture"] = pipeline.vae.decode(latents()).sample
            folder = root / "out" / preset / "diffusers" / "unet"
            pipeline.unet = type(pipeline.unet).from_pretrained(folder, torch_dtype=torch.float32)
        found |= {f"{preset}.{name}": t for name, t in measured(pipeline, prompt).items()}
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, root / "reference.safetensors")


def sigma(scheduler: Any) -> Tensor:
    """Return the noise's deviation at the timestep, where the picture's is 1."""
    kept = scheduler.alphas_cumprod[TIMESTEP]
    return ((1 - kept) / kept) ** 0.5


if __name__ == "__main__":
    write_reference(Path(sys.argv[1]))
