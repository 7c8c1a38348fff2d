"""Stable Diffusion XL base (Podell et al. 2023, https://arxiv.org/abs/2307.01952): two text encoders, and sizes.

The U-Net sees the penultimate hidden states of both encoders side by side, and a vector of the second one's projected
end of text with the picture's original size, crop and target size (§2.2). The refiner is another family.
"""

from __future__ import annotations

from typing import Any, ClassVar, final

from sdforge.families.stable_diffusion import (
    CONVOLUTIONS,
    UNET,
    StableDiffusion,
    TextEncoder,
    channels,
    fact_owners,
    neutral_facts,
    stated_levels,
    unused_projection,
)

FIRST = TextEncoder(
    "text_encoder", "conditioner.embedders.0.transformer.", layers=12, heads=12, activation="quick_gelu"
)
SECOND = TextEncoder(
    "text_encoder_2",
    "conditioner.embedders.1.model.",
    layers=32,
    heads=20,
    activation="gelu",
    padding="!",  # OpenCLIP fills prompts with zeros, and token 0 is `!`
    fused=True,
    projected=True,
)


@final
class StableDiffusionXL(StableDiffusion):
    """Three levels, without attention at the first; ten transformer blocks at the last."""

    name = "sdxl"
    version = 2
    title = "Stable Diffusion XL"
    architecture = "stable-diffusion-xl-v1-base"
    architecture_v = "stable-diffusion-xl-v1-base"
    kohya_version = "sdxl_base_v1-0"
    kohya_version_v = "sdxl_base_v1-0"
    kohya_prefix: ClassVar = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    sgm_names = True
    convolutions = CONVOLUTIONS
    networks = ("unet", "text_encoder", "text_encoder_2", "vae")
    kept = ("vae",)
    spare = ()
    unsaid = ()
    image_embeddings = False
    latents = "sdxl"
    neutral: ClassVar = neutral_facts(heads=[5, 10, 20], resolution=1024, scaling=0.13025, encoders=(FIRST, SECOND))
    owners: ClassVar = fact_owners(neutral)

    pipeline = "StableDiffusionXLPipeline"
    classes: ClassVar = {
        "scheduler": ("diffusers", "DDIMScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    index: ClassVar = {"force_zeros_for_empty_prompt": True}

    depths = (0, 2, 10)
    linear = True
    label = "add_embedding"
    adapters_of = ()
    context = 2048
    encoders = (FIRST, SECOND)
    images = None
    unused: ClassVar = unused_projection(FIRST)

    def owns(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        deepest = f"{UNET}input_blocks.7.1.transformer_blocks.9.attn2.to_k.weight"
        return deepest in shapes and f"{UNET}label_emb.0.0.weight" in shapes and channels(shapes) == 4

    def owns_folder(self, configs: dict[str, dict[str, Any]]) -> bool:
        unet = configs.get("unet", {})
        return unet.get("addition_embed_type") == "text_time" and stated_levels(unet) == 3


FAMILY = StableDiffusionXL()
