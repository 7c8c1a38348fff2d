"""The shape of a base: Stable Diffusion 1.5's topology, narrower, and its folder as diffusers writes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from demo.geometry import CELLS, SIZE
from demo.tokenizer import END, MAX_TOKENS, START, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SCALING_FACTOR = 0.18215  # as in Stable Diffusion 1.x; see autoencoder.fold_normalisation
TEXT_WIDTH = 64
LATENT_CHANNELS = 4
TRAIN_STEPS = 1000  # of the noise schedule
BETA_START, BETA_END = 0.00085, 0.012

# Programs for Stable Diffusion 1.x look for the names that transformers wrote before 5.6.
TEXT_PREFIX = "text_model."

DIFFUSERS = "0.42.1"  # the version whose folders are written

UNET_CONFIG: dict[str, Any] = {
    "sample_size": CELLS,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "block_out_channels": (40, 56, 72, 56),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": TEXT_WIDTH,
    # The number of heads, whatever the name says: diffusers reads it so for Stable Diffusion 1.x.
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
_VAE_CONFIG: dict[str, Any] = {
    "sample_size": SIZE,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": LATENT_CHANNELS,
    "norm_num_groups": 8,
    "scaling_factor": SCALING_FACTOR,
}
SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": DIFFUSERS,
    "beta_schedule": "scaled_linear",
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "num_train_timesteps": TRAIN_STEPS,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "timestep_spacing": "leading",
}
_MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": DIFFUSERS,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@dataclass(frozen=True)
class Base:
    """The parts of a base that draw."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: Tokenizer

    def to(self, target: torch.device) -> Base:
        """Move everything to a device."""
        for module in (self.unet, self.vae, self.text_encoder):
            module.to(target)
        return self


def new_unet() -> UNet2DConditionModel:
    """Return an untrained U-Net for latents (B, 4, 16, 16) and text (B, 77, 64)."""
    return UNet2DConditionModel(**UNET_CONFIG)


def new_vae() -> AutoencoderKL:
    """Return an untrained autoencoder: pictures (B, 3, 128, 128) in -1..1 to latents (B, 4, 16, 16)."""
    return AutoencoderKL(**_VAE_CONFIG)


def new_text_encoder(tokenizer: Tokenizer) -> CLIPTextModel:
    """Return an untrained CLIP text model: ids (B, 77) to states (B, 77, 64)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.id_of(START),
            eos_token_id=tokenizer.id_of(END),
            pad_token_id=tokenizer.id_of(END),
        )
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a configuration, its keys sorted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write weights in fp16, without position ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {
        key: value.detach().cpu().to(torch.float16).contiguous()
        for key, value in state.items()
        if not key.endswith("position_ids")
    }
    save_file(halves, path, metadata={"format": "pt"})
    path.chmod(0o644)


def diffusers_config(model: Any) -> dict[str, Any]:
    """Return a model's configuration as diffusers writes it."""
    # diffusers' private entries come in another order every time
    stated = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    return stated | {"_class_name": type(model).__name__, "_diffusers_version": DIFFUSERS}


def text_config(encoder: CLIPTextModel) -> dict[str, Any]:
    """Return a text encoder's configuration as transformers writes it."""
    keys = (
        "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_factor",
        "initializer_range", "intermediate_size", "layer_norm_eps", "max_position_embeddings", "num_attention_heads",
        "num_hidden_layers", "pad_token_id", "projection_dim", "vocab_size",
    )  # fmt: skip
    values = {key: getattr(encoder.config, key) for key in keys}
    return values | {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "torch_dtype": "float32"}


def old_text_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a text encoder's state dict with the names that every program knows."""
    return {key if key.startswith(TEXT_PREFIX) else TEXT_PREFIX + key: value for key, value in state.items()}


def write_base(folder: Path, base: Base) -> None:
    """Write the diffusers folder of a base, weights in fp16."""
    write_json(folder / "model_index.json", _MODEL_INDEX)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    write_json(folder / "unet" / "config.json", diffusers_config(base.unet))
    write_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", base.unet.state_dict())
    write_json(folder / "vae" / "config.json", diffusers_config(base.vae))
    write_weights(folder / "vae" / "diffusion_pytorch_model.safetensors", base.vae.state_dict())
    write_json(folder / "text_encoder" / "config.json", text_config(base.text_encoder))
    text_state = old_text_names(base.text_encoder.state_dict())
    write_weights(folder / "text_encoder" / "model.safetensors", text_state)
    base.tokenizer.write(folder / "tokenizer")


def read_base(folder: Path) -> Base:
    """Read a base folder, weights in fp32."""
    tokenizer = Tokenizer.read(folder / "tokenizer")
    unet, vae, encoder = new_unet(), new_vae(), new_text_encoder(tokenizer)
    unet.load_state_dict(read_weights(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    vae.load_state_dict(read_weights(folder / "vae" / "diffusion_pytorch_model.safetensors"))
    text_state = read_weights(folder / "text_encoder" / "model.safetensors")
    has_prefix = next(iter(encoder.state_dict())).startswith(TEXT_PREFIX)
    renamed = {key if has_prefix else key.removeprefix(TEXT_PREFIX): value for key, value in text_state.items()}
    encoder.load_state_dict(renamed)
    return Base(unet.eval(), vae.eval(), encoder.eval(), tokenizer)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read weights in fp32."""
    return {key: value.float() for key, value in load_file(path).items()}
