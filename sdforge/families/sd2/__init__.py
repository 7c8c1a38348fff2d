"""Stable Diffusion 2.x, 512-base (ε) and 768-v: 1.x with matrices around its attention, and OpenCLIP ViT-H.

Of the text model's 24 layers the last is never used (https://github.com/Stability-AI/stablediffusion, `layer:
penultimate`): 23 are kept, and the U-Net sees what they say through the final norm. Nothing in the tensors of a file
tells ε from v; where the file does not say it either, its source states `prediction = "v_prediction"`.
"""

from __future__ import annotations

from typing import Any, ClassVar, final

from sdforge.families.stable_diffusion import (
    CONVOLUTIONS,
    UNET,
    VIT_H,
    VIT_H_UNUSED,
    StableDiffusion,
    fact_owners,
    has_four_levels,
    has_matrices,
    lone_unet,
    neutral_facts,
)

SGM = "conditioner.embedders.0.model."  # how the text encoder's names begin in Stability's later code


@final
class StableDiffusion2(StableDiffusion):
    """The U-Net sees the text encoder's last hidden states, as in 1.x."""

    name = "sd2"
    version = 1
    title = "Stable Diffusion 2.x"
    architecture = "stable-diffusion-v2-512"
    architecture_v = "stable-diffusion-v2-768-v"
    kohya_version = "sd_v2"
    kohya_version_v = "sd_v2_v"
    kohya_prefix: ClassVar = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    convolutions = CONVOLUTIONS
    kohya_convolutions = ("proj_in", "proj_out")
    networks = ("unet", "text_encoder", "vae")
    kept = ("vae",)
    spare = ()
    unsaid = ("prediction",)
    image_embeddings = False
    neutral: ClassVar = neutral_facts(heads=[5, 10, 20, 20], resolution=512, scaling=0.18215, encoders=(VIT_H,))
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
    linear = True
    label = ""
    adapters_of = ()
    context = 1024
    encoders = (VIT_H,)
    images = None
    unused: ClassVar = VIT_H_UNUSED

    def owns(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        if f"{UNET}label_emb.0.0.weight" in shapes or f"{VIT_H.single}visual.conv1.weight" in shapes:
            return False
        named = any(f"{start}ln_final.weight" in shapes for start in (VIT_H.single, SGM))
        return (has_four_levels(shapes) and named) or lone_unet(shapes, linear=True)

    def alias(self, name: str) -> str:
        return VIT_H.single + name.removeprefix(SGM) if name.startswith(SGM) else super().alias(name)

    def owns_folder(self, configs: dict[str, dict[str, Any]]) -> bool:
        unet = configs.get("unet", {})
        return "text_encoder_2" not in configs and has_matrices(unet) and not unet.get("class_embed_type")


FAMILY = StableDiffusion2()
