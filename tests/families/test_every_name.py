"""The names of the other families against real networks without a byte of weights, and diffusers' own converters."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as stock
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from benchmarks.networks import BIG_G, VAE, VIT_L
from benchmarks.networks import UNETS as REAL
from sdforge.families import Name, family
from sdforge.families.sdxl import FIRST

SD2: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd2": SD2,
    "sdxl": REAL["sdxl"],
    "unclip": SD2 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048},
    "image_variations": REAL["sd15"],
}
VIT_H = {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "intermediate_size": 4096}
TEXTS = {
    ("sd2", ""): VIT_H,
    ("sdxl", ""): VIT_L,
    ("sdxl", "_2"): BIG_G,
    ("unclip", ""): VIT_H,
}
VISIONS: dict[str, dict[str, Any]] = {
    "unclip": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14},
    "image_variations": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14},
}
EACH = pytest.mark.parametrize("name", UNETS)
EACH_TEXT = pytest.mark.parametrize(("name", "suffix"), TEXTS)


@cache
def full(name: str, part: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a network as wide as the real one."""
    with torch.device("meta"):
        if part == "unet":
            network: Any = UNet2DConditionModel(**UNETS[name])
        elif part == "vae":
            network = AutoencoderKL(**VAE)
        elif part == "image_encoder":
            network = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISIONS[name]))
        else:
            suffix = part.removeprefix("text_encoder")
            kind = CLIPTextModelWithProjection if suffix else CLIPTextModel
            network = kind(CLIPTextConfig(**TEXTS[name, suffix]))
    tensors = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    if part == "text_encoder":
        tensors = {f"text_model.{key.removeprefix('text_model.')}": shape for key, shape in tensors.items()}
    return {key: shape for key, shape in tensors.items() if not key.endswith("position_ids")}


def parts(name: str) -> list[str]:
    return [part for part in family(name).networks if part != "image_normalizer"]


def real(name: str, part: str) -> list[Name]:
    return [n for n in family(name).names() if n.component == part and n.canonical in full(name, part)]


@EACH
def test_every_tensor_of_the_real_networks_has_a_name(name: str) -> None:
    for part in parts(name):
        assert {n.canonical for n in real(name, part)} == set(full(name, part)), part
        required = {n.canonical for n in family(name).names() if n.component == part and not n.optional}
        assert required <= set(full(name, part))


@EACH
def test_what_a_narrow_copy_may_have_beside_them_is_shortcuts(name: str) -> None:
    there = {(n.component, n.canonical) for part in parts(name) for n in real(name, part)}
    more = [n for n in family(name).names() if (n.component, n.canonical) not in there]
    more = [n for n in more if n.component != "image_normalizer"]
    # the smaller of unCLIP's two image encoders has fewer layers
    assert all(n.optional and ".conv_shortcut." in n.canonical for n in more)


@EACH
def test_every_tensor_has_as_many_axes_as_in_the_real_networks(name: str) -> None:
    of = family(name)
    odd = [n.canonical for p in parts(name) for n in real(name, p) if of.axes(n) != len(full(name, p)[n.canonical])]
    assert not odd


def tagged(names: list[Name]) -> dict[str, Tensor]:
    """A single file of small tensors that hold the numbers of their names; what is fused is one for each part."""
    found: dict[str, Tensor] = {}
    for i, n in enumerate(names):
        row = torch.full((1, 1, 1, 1) if n.conv else (1, 1), i)
        found[n.single] = torch.cat([found[n.single], row]) if n.single in found else row
    return found


def numbers(converted: dict[str, Tensor], names: list[Name]) -> dict[str, Name]:
    return {key: names[int(tensor.flatten()[0])] for key, tensor in converted.items()}


@EACH
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_diffusers_converts_unets_and_vaes_as_we_do(part: str, name: str) -> None:
    names = real(name, part)
    if part == "unet":
        with torch.device("meta"):
            config = dict(UNet2DConditionModel(**UNETS[name]).config)
        found = stock.convert_ldm_unet_checkpoint(tagged(names), config)
    else:
        found = stock.convert_ldm_vae_checkpoint(tagged(names), VAE)
    assert numbers(found, names) == {n.canonical: n for n in names}


@EACH_TEXT
def test_diffusers_converts_text_encoders_as_we_do(name: str, suffix: str) -> None:
    names = real(name, f"text_encoder{suffix}")
    single = tagged(names)
    if names[0].single.startswith(FIRST.single):
        found = stock.convert_ldm_clip_checkpoint(single)
    else:
        prefix = names[0].single.removesuffix("token_embedding.weight")
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=1))
        found = stock.convert_open_clip_checkpoint(model, single, prefix)
    assert numbers(found, names) == {n.canonical: n for n in names}


@EACH
def test_convolutions_are_told_by_their_names(name: str) -> None:
    shapes = full(name, "unet")
    for module in family(name).modules():
        if module.startswith("unet.") and f"{module.removeprefix('unet.')}.weight" in shapes:
            shape = shapes[f"{module.removeprefix('unet.')}.weight"]
            assert family(name).is_conv(module) == (len(shape) == 4), module


@EACH
def test_every_layer_of_unet_and_text_encoders_can_have_a_lora(name: str) -> None:
    found = family(name)
    for part in ("unet", *found.text_encoders):
        weights = {key: shape for key, shape in full(name, part).items() if key.endswith(".weight") and len(shape) > 1}
        layers = {f"{part}.{key.removesuffix('.weight')}" for key in weights if ".embeddings." not in key}
        assert layers <= found.modules()


@EACH
def test_real_widths_give_the_real_configurations(name: str) -> None:
    found = family(name)
    configs = found.configs({}, {part: full(name, part) for part in parts(name)})
    stated = UNETS[name] | {"attention_head_dim": UNETS[name].get("attention_head_dim", 8)}
    for key, value in stated.items():
        own = configs["unet"][key]
        assert own == (list(value) if isinstance(value, tuple) else value), key
    assert configs["unet"]["sample_size"] == {"sdxl": 128, "unclip": 96}.get(name, 64)
    for (other, suffix), text in TEXTS.items():
        if other == name:
            assert text.items() <= configs[f"text_encoder{suffix}"].items()
    if name in VISIONS:
        assert VISIONS[name].items() <= configs["image_encoder"].items()
        assert configs["image_encoder"]["image_size"] == 224


@pytest.mark.parametrize(
    ("name", "canonical", "block"),
    [
        ("sdxl", "add_embedding.linear_2.bias", "label"),
        ("sdxl", "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k.weight", "in04"),
        ("sdxl", "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight", "in08"),
        ("sdxl", "mid_block.attentions.0.transformer_blocks.9.attn2.to_k.weight", "mid"),
        ("sdxl", "up_blocks.0.upsamplers.0.conv.weight", "out02"),
        ("sdxl", "up_blocks.2.resnets.2.conv2.weight", "out08"),
        ("unclip", "class_embedding.linear_1.weight", "label"),
        ("sd2", "up_blocks.3.attentions.2.proj_out.weight", "out11"),
    ],
)
def test_blocks_are_those_of_the_merge_programs(name: str, canonical: str, block: str) -> None:
    (found,) = (n for n in family(name).names() if (n.component, n.canonical) == ("unet", canonical))
    assert found.block == block
