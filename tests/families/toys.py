"""A random checkpoint of every family in its true topology, written by diffusers and transformers themselves.

Widths differ wherever a family allows it, so that nothing fits by accident. `sd2` predicts v.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sdforge.formats.tokenizer import END, tokenizer_files
from tests.families.workbench import TEXT, UNET, VAE, shaken, vocabulary, write_toy

LINEAR: dict[str, Any] = UNET | {"use_linear_projection": True, "attention_head_dim": [2, 2, 4, 4]}
XL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 40,
    "attention_head_dim": [2, 2, 4],
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 68,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 12,
    "image_size": 32,
    "patch_size": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd2": {"unet": LINEAR, "text_encoder": TEXT | {"hidden_act": "gelu"}},
    "sdxl": {
        "unet": XL,
        "text_encoder": TEXT,
        "text_encoder_2": TEXT | {"hidden_size": 24, "projection_dim": 20, "hidden_act": "gelu"},
    },
    "unclip": {
        "unet": LINEAR | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 24},
        "text_encoder": TEXT | {"hidden_act": "gelu"},
        "image_encoder": VISION | {"hidden_act": "gelu"},
    },
    "image_variations": {"unet": UNET | {"cross_attention_dim": 12}, "image_encoder": VISION},
}
PADDING = {"sd2": ("!",), "sdxl": (END, "!"), "unclip": ("!",), "image_variations": ()}
TOYS = ("sd15", *CONFIGS)


def write_family(folder: Path, name: str, seed: int = 1, dtype: torch.dtype = torch.float16) -> Path:
    """Write the toy of a family, if it is not there yet."""
    if name == "sd15":
        return write_toy(folder, seed, dtype)
    if not folder.exists():
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            _pipeline(folder, name, dtype).save_pretrained(folder)
    return folder


def _pipeline(folder: Path, name: str, dtype: torch.dtype) -> Any:
    import diffusers
    from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    configs, size = CONFIGS[name], len(vocabulary()["vocab"])
    ids = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    parts: dict[str, Any] = {
        "unet": shaken(diffusers.UNet2DConditionModel(**configs["unet"]), dtype),
        "vae": shaken(diffusers.AutoencoderKL(**VAE), dtype),
        "scheduler": diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction" if name == "sd2" else "epsilon",
        ),
    }
    for suffix, padding in zip(("", "_2"), PADDING[name], strict=False):
        config = CLIPTextConfig(**configs[f"text_encoder{suffix}"], **ids)
        kind = CLIPTextModelWithProjection if suffix else CLIPTextModel
        parts[f"text_encoder{suffix}"] = shaken(kind(config), dtype)
        parts[f"tokenizer{suffix}"] = _tokenizer(folder.with_name(f"{folder.name}-tokenizer{suffix}"), padding)
    if "image_encoder" in configs:
        parts["image_encoder"] = _image_encoder(configs["image_encoder"], dtype)
        edge = VISION["image_size"]
        square = {"height": edge, "width": edge}
        parts["feature_extractor"] = CLIPImageProcessor(size={"shortest_edge": edge}, crop_size=square)
    if name == "sdxl":
        return diffusers.StableDiffusionXLPipeline(**parts)
    if name == "unclip":
        from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

        parts["image_normalizer"] = shaken(StableUnCLIPImageNormalizer(VISION["projection_dim"]), dtype)
        parts["image_noising_scheduler"] = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        return diffusers.StableUnCLIPImg2ImgPipeline(**parts)
    safety = {"safety_checker": None, "requires_safety_checker": False}
    if name == "image_variations":
        return diffusers.StableDiffusionImageVariationPipeline(**parts, **safety)
    return diffusers.StableDiffusionPipeline(**parts, **safety, feature_extractor=None)


def _image_encoder(config: dict[str, Any], dtype: torch.dtype) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return shaken(CLIPVisionModelWithProjection(CLIPVisionConfig(**config)), dtype)


def _tokenizer(folder: Path, padding: str) -> Any:
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    for name, text in tokenizer_files(vocabulary(), [], padding).items():
        (folder / name).write_text(text, encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)
