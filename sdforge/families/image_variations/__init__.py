"""Image variations (https://github.com/justinpinkney/stable-diffusion): 1.x that is shown a picture, not told.

Cross-attention sees one token, the projected embedding of OpenAI's CLIP ViT-L/14; nothing is said by zeros.
"""

from __future__ import annotations

from typing import Any, ClassVar, final

from sdforge.families.stable_diffusion import (
    CONVOLUTIONS,
    ImageEncoder,
    StableDiffusion,
    fact_owners,
    has_four_levels,
    has_matrices,
    neutral_facts,
    unused_half,
)

CLIP = "cond_stage_model.model."
IMAGES = ImageEncoder(f"{CLIP}visual.", layers=24, heads=16, activation="quick_gelu")


@final
class ImageVariations(StableDiffusion):
    """The U-Net of 1.x; no text encoder, no tokenizer."""

    name = "image_variations"
    version = 1
    title = "Stable Diffusion image variations"
    architecture = "stable-diffusion-v1-image-variations"
    architecture_v = "stable-diffusion-v1-image-variations"
    kohya_version = "sd_v1"
    kohya_version_v = "sd_v1_v"
    kohya_prefix: ClassVar = {"unet": "lora_unet_"}
    convolutions = (*CONVOLUTIONS, "proj_in", "proj_out")
    networks = ("unet", "image_encoder", "vae")
    kept = ("image_encoder", "vae")
    spare = ("image_encoder",)
    unsaid = ()
    image_embeddings = True
    neutral: ClassVar = neutral_facts(heads=8, resolution=512, scaling=0.18215, encoders=(), images=IMAGES)
    owners: ClassVar = fact_owners(neutral)

    pipeline = "StableDiffusionImageVariationPipeline"
    classes: ClassVar = {
        "feature_extractor": ("transformers", "CLIPImageProcessor"),
        "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
        "scheduler": ("diffusers", "DDIMScheduler"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    index: ClassVar = {"requires_safety_checker": False, "safety_checker": [None, None]}

    depths = (1, 1, 1, 0)
    linear = False
    label = ""
    adapters_of = ("sd15",)
    context = 768
    encoders = ()
    images = IMAGES
    unused: ClassVar = unused_half(CLIP)

    def owns(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        return has_four_levels(shapes) and f"{CLIP}visual.conv1.weight" in shapes

    def owns_folder(self, configs: dict[str, dict[str, Any]]) -> bool:
        unet = configs.get("unet", {})
        pictures_alone = "image_encoder" in configs and "text_encoder" not in configs
        return bool(unet) and pictures_alone and not has_matrices(unet)


FAMILY = ImageVariations()
