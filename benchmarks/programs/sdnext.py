"""SD.Next, without its pages, on files that `forge install` has put into its folder."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))
from kit import Trial

TRIAL = Trial()
os.chdir(TRIAL.program)
os.environ["HF_HUB_OFFLINE"] = "1"
sys.argv[1:] = [
    "--data-dir",
    str(TRIAL.home),
    "--models-dir",
    str(TRIAL.home / "models"),
    "--use-cpu",
    "all",
    "--backend",
    "diffusers",
    "--no-hashing",
]

import installer  # noqa: E402, F401
import modules.loader  # noqa: E402, F401

for first in ("modules.shared", "modules.sd_models"):  # since they import each other in a circle
    importlib.import_module(first)
from modules import devices, sd_checkpoint, sd_models, shared  # noqa: E402
from modules.lora import networks  # noqa: E402

PROMPT = "a drawing of mascot with red hair"


def start() -> None:
    """Do what the program does at its start, in fp32."""
    shared.opts.data |= {"diffusers_offload_mode": "none", "lora_fuse_diffusers": False, "cuda_dtype": "FP32"}
    devices.dtype = devices.dtype_vae = devices.dtype_unet = torch.float32
    sd_checkpoint.setup_model()
    shared.log.addHandler(TRIAL.said)
    logging.getLogger().removeHandler(TRIAL.said)


def checkpoint(name: str, preset: str) -> Any:
    """Load what the program lists under a name, and put it to the reference's prompt and latents."""
    with TRIAL.row(name) as row:
        sd_models.unload_model_weights(op="model")
        info = sd_checkpoint.get_closet_checkpoint_match(name.removesuffix("/"))
        sd_models.load_diffuser(checkpoint_info=info)
        pipeline = shared.sd_model
        row["kind"] = type(pipeline).__name__
        row["words"] = sorted(pipeline.embedding_db.word_embeddings)
        encoded = pipeline.encode_prompt(PROMPT, "cpu", 1, False)
        row["context"] = TRIAL.ratio(f"{preset}.context", encoded[0])
        found, more = TRIAL.reference, {}
        if TRIAL.sdxl:
            size = 8.0 * found["latents"].shape[-1]
            sizes = torch.tensor([[size, size, 0.0, 0.0, size, size]])
            more = {"added_cond_kwargs": {"text_embeds": encoded[2], "time_ids": sizes}}
        seen = pipeline.unet(found["latents"], found["timestep"], encoder_hidden_states=encoded[0], **more).sample
        row["noise"] = TRIAL.ratio(f"{preset}.noise", seen)
        if preset == "plain":
            row["picture"] = TRIAL.ratio("picture", pipeline.vae.decode(found["latents"]).sample)
    return shared.sd_model


def loras(pipeline: Any, preset: str, strength: float) -> None:
    networks.list_available_networks()

    def theirs(name: str) -> torch.Tensor | None:
        component, _, path = name.partition(".")
        return dict(getattr(pipeline, component).named_parameters()).get(path)

    for file in sorted((TRIAL.root / "loras" / preset).glob("*.safetensors")):
        if file.stem.endswith(".diffusers"):
            continue
        with TRIAL.row(f"loras/{file.name}") as row:
            networks.network_load([file.stem], [strength], [strength])
            row["kind"] = networks.available_networks[file.stem].sd_version
            networks.network_activate()
            row |= TRIAL.change(preset, TRIAL.loras[file.stem], theirs)
            networks.network_load([])
            networks.network_activate()


@torch.no_grad()
def main() -> None:
    start()
    for preset in ("forms", "whole"):
        checkpoint(f"{preset}.safetensors", preset)
    pipeline = checkpoint("plain.safetensors", "plain")
    for preset, strength in (("whole", 0.8), ("forms", 1.0)):
        loras(pipeline, preset, strength)
    TRIAL.end()


if __name__ == "__main__":
    main()
