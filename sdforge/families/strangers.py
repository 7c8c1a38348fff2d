"""Architectures that are recognised so that they can be refused by name: from headers and configurations alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sdforge.families.stable_diffusion import UNET, channels, stated_levels

FAMILIES_HINT = "`forge list --families` names what can be used"

FLUX, SD3, REFINER = "a FLUX checkpoint", "a Stable Diffusion 3 checkpoint", "the refiner of Stable Diffusion XL"
# how many channels a U-Net takes when it is told more than noisy latents
TOLD = {
    5: "a depth-to-image checkpoint",
    7: "an upscaler's checkpoint",
    8: "an InstructPix2Pix checkpoint",
    9: "an inpainting checkpoint",
}
# tensors (in a single file, `model.diffusion_model.` left out) → what has them
TELLTALE = {
    "double_blocks.0.img_attn.qkv.weight": FLUX,
    "joint_blocks.0.x_block.attn.qkv.weight": SD3,
    "encoder.block.0.layer.0.SelfAttention.q.weight": "the T5 text encoder of Stable Diffusion 3 and FLUX",
}
EDM = {"edm_vpred.sigma_max", "edm_mean"}  # CosXL's file has the one, Playground 2.5's the other
# the refiner's U-Net is told of sizes, as SDXL's is, and has four levels, the first without attention
REFINER_HAS = "label_emb.0.0.weight", "input_blocks.11.0.in_layers.2.weight"
REFINER_TEXT = "conditioner.embedders.0.model.ln_final.weight"
REFINER_LACKS = "input_blocks.1.1.proj_in.weight"
REFINER_UNET = "add_embedding.linear_1.weight", "down_blocks.3.resnets.0.conv1.weight"
VAES = {16: "the VAE of Stable Diffusion 3 or FLUX"}  # channels of its latents → whose VAE it is
NETWORKS = {"FluxTransformer2DModel": FLUX, "SD3Transformer2DModel": SD3}
# what stands in the names of LoRAs' tensors, however they are spelled → for which architecture those are
ADAPTED = {
    "double_blocks": "FLUX",
    "single_blocks": "FLUX",
    "single_transformer_blocks": "FLUX",
    "joint_blocks": "Stable Diffusion 3",
    "transformer.transformer_blocks": "Stable Diffusion 3",  # FLUX' have single ones too
    "lora_te3_": "Stable Diffusion 3 or FLUX",
}


def stranger(shapes: dict[str, tuple[int, ...]]) -> str:
    """Say what a single file with these tensors (name → shape) is, if it is none of ours but known; else nothing."""
    for name, title in TELLTALE.items():
        if name in shapes or UNET + name in shapes:
            return title
    if _has_refiner(shapes) or (REFINER_TEXT in shapes and not _is_told_of_no_sizes(shapes)):
        return REFINER
    if not EDM.isdisjoint(shapes):
        return "a checkpoint that predicts as EDM does"
    return TOLD.get(channels(shapes), "")


def _is_told_of_no_sizes(shapes: dict[str, tuple[int, ...]]) -> bool:
    """Say whether there is a U-Net that is told of no sizes: Stable Diffusion 2 may have its text encoder so named."""
    return channels(shapes) > 0 and UNET + REFINER_HAS[0] not in shapes


def _has_refiner(shapes: dict[str, tuple[int, ...]]) -> bool:
    return all(UNET + name in shapes for name in REFINER_HAS) and UNET + REFINER_LACKS not in shapes


def stranger_unet(shapes: dict[str, tuple[int, ...]]) -> str:
    """Say whose a U-Net with these tensors (diffusers' name → shape) is, if that is none of ours but known."""
    if all(name in shapes for name in REFINER_UNET):
        return REFINER
    return TOLD.get((*shapes.get("conv_in.weight", ()), 0, 0)[1], "")


def stranger_vae(shapes: dict[str, tuple[int, ...]]) -> str:
    """Say whose a VAE with these tensors (name → shape) is, if that is none of ours but known."""
    return VAES.get((*shapes.get("decoder.conv_in.weight", ()), 0, 0)[1], "")


def stranger_adapter(names: Iterable[str]) -> str:
    """Say for which architecture a LoRA with tensors of these names is, if that is none of ours but known."""
    whole = " ".join(names)
    return next((title for part, title in ADAPTED.items() if part in whole), "")


def stranger_folder(configs: dict[str, dict[str, Any]]) -> str:
    """Say what a diffusers folder with these configurations is, if it is none of ours but known; else nothing."""
    if other := NETWORKS.get(str(configs.get("transformer", {}).get("_class_name"))):
        return other
    unet = configs.get("unet", {})
    if "text_encoder_2" in configs and "text_encoder" not in configs and stated_levels(unet) == 4:
        return REFINER
    return next((title for count, title in TOLD.items() if count == unet.get("in_channels")), "")
