"""Stable Diffusion 1.x: a U-Net of four levels, one CLIP text encoder, the KL autoencoder (Rombach et al. 2022)."""

from __future__ import annotations

from typing import Any, ClassVar, final

from sdforge.families.stable_diffusion import (
    CONVOLUTIONS,
    StableDiffusion,
    TextEncoder,
    fact_owners,
    has_four_levels,
    has_matrices,
    lone_unet,
    neutral_facts,
    unused_projection,
)

TEXT = TextEncoder("text_encoder", "cond_stage_model.transformer.", layers=12, heads=12, activation="quick_gelu")


@final
class StableDiffusion1(StableDiffusion):
    """The U-Net sees the text encoder's last hidden states."""

    name = "sd15"
    version = 1
    title = "Stable Diffusion 1.x"
    architecture = "stable-diffusion-v1"
    architecture_v = "stable-diffusion-v1"
    kohya_version = "sd_v1"
    kohya_version_v = "sd_v1_v"
    kohya_prefix: ClassVar = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    convolutions = (*CONVOLUTIONS, "proj_in", "proj_out")
    networks = ("unet", "text_encoder", "vae")
    kept = ("vae",)
    spare = ()
    unsaid = ()
    image_embeddings = False
    neutral: ClassVar = neutral_facts(heads=8, resolution=512, scaling=0.18215, encoders=(TEXT,))
    owners: ClassVar = fact_owners(neutral)

    pipeline = "StableDiffusionPipeline"
    classes: ClassVar = {
        "scheduler": ("diffusers", "DDIMScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    index: ClassVar = {
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
    }

    depths = (1, 1, 1, 0)
    linear = False
    label = ""
    adapters_of = ()
    context = 768
    encoders = (TEXT,)
    images = None
    unused: ClassVar = unused_projection(TEXT)

    def owns(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        whole = has_four_levels(shapes) and any(name.startswith(TEXT.single) for name in shapes)
        return whole or lone_unet(shapes, linear=False)

    def owns_folder(self, configs: dict[str, dict[str, Any]]) -> bool:
        unet = configs.get("unet", {})
        other = "text_encoder_2" in configs or ("image_encoder" in configs and "text_encoder" not in configs)
        return bool(unet) and not other and not has_matrices(unet)


FAMILY = StableDiffusion1()
