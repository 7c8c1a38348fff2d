"""Stable unCLIP 2.1 (https://github.com/Stability-AI/stablediffusion, `UNCLIP.MD`): 2.x that is shown a picture.

Beside the prompt the U-Net takes a vector: a CLIP image embedding to which noise was added, and the noise's level. The
embedding is normalised for the noise and brought back; `-h` is shown OpenCLIP ViT-H's, `-l` (diffusers: `-small`)
OpenAI's ViT-L/14's. Nothing in a single file tells ε from v: its source states `prediction = "v_prediction"`.
"""

from __future__ import annotations

from typing import Any, ClassVar, final

from sdforge.families.stable_diffusion import (
    CONVOLUTIONS,
    UNET,
    VIT_H,
    VIT_H_UNUSED,
    ImageEncoder,
    StableDiffusion,
    fact_owners,
    has_four_levels,
    has_matrices,
    lone_unet,
    neutral_facts,
    unused_half,
)

EMBEDDER = "embedder.model."
IMAGES = ImageEncoder(f"{EMBEDDER}visual.", layers=32, heads=16, activation="gelu")


@final
class StableUnclip(StableDiffusion):
    """The topology of 2.x with the layers for the picture's vector."""

    name = "unclip"
    version = 1
    title = "Stable unCLIP 2.1"
    architecture = "stable-diffusion-v2-unclip-h"
    architecture_v = "stable-diffusion-v2-unclip-h"
    kohya_version = "sd_v2"
    kohya_version_v = "sd_v2_v"
    kohya_prefix: ClassVar = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    convolutions = CONVOLUTIONS
    kohya_convolutions = ("proj_in", "proj_out")
    networks = ("unet", "text_encoder", "image_encoder", "image_normalizer", "vae")
    kept = ("image_encoder", "image_normalizer", "vae")
    spare = ("image_encoder", "image_normalizer")
    unsaid = ("prediction",)
    image_embeddings = True
    without_pictures = "sd2"
    neutral: ClassVar = neutral_facts(
        heads=[5, 10, 20, 20], resolution=768, scaling=0.18215, encoders=(VIT_H,), images=IMAGES
    )
    owners: ClassVar = fact_owners(neutral)

    pipeline = "StableUnCLIPImg2ImgPipeline"
    classes: ClassVar = {
        "feature_extractor": ("transformers", "CLIPImageProcessor"),
        "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
        "image_noising_scheduler": ("diffusers", "DDPMScheduler"),
        "image_normalizer": ("stable_diffusion", "StableUnCLIPImageNormalizer"),
        "scheduler": ("diffusers", "DDIMScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    index: ClassVar = {}

    depths = (1, 1, 1, 0)
    linear = True
    label = "class_embedding"
    adapters_of = ("sd2",)
    context = 1024
    encoders = (VIT_H,)
    images = IMAGES
    unused: ClassVar = VIT_H_UNUSED | unused_half(EMBEDDER)

    def owns(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        whole = has_four_levels(shapes) and f"{VIT_H.single}ln_final.weight" in shapes
        return f"{UNET}label_emb.0.0.weight" in shapes and (whole or lone_unet(shapes, linear=True))

    def owns_folder(self, configs: dict[str, dict[str, Any]]) -> bool:
        unet = configs.get("unet", {})
        return has_matrices(unet) and unet.get("class_embed_type") == "projection"


FAMILY = StableUnclip()
