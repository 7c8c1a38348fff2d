"""The names of Stable Diffusion 1.x against diffusers' own networks and its own converters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as stock
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.networks import UNETS, VAE, VIT_L
from sdforge.families import Name
from tests.families.workbench import SD15

UNET = UNETS["sd15"]


def full(part: str) -> Any:
    """A network as wide as the real one, without a byte of weights."""
    with torch.device("meta"):
        if part == "unet":
            return UNet2DConditionModel(**UNET)
        if part == "vae":
            return AutoencoderKL(**VAE)
        return CLIPTextModel(CLIPTextConfig(**VIT_L))


def real(part: str) -> list[Name]:
    """The names that the real checkpoint has: narrow copies may have further shortcuts."""
    there = {
        n if n.startswith("text_model.") or part != "text_encoder" else f"text_model.{n}"
        for n in full(part).state_dict()
    }
    return [n for n in SD15.names() if n.component == part and n.canonical in there]


@pytest.mark.parametrize(("part", "count"), [("unet", 686), ("text_encoder", 196), ("vae", 248)])
def test_every_tensor_of_the_real_networks_has_a_name(part: str, count: int) -> None:
    names = real(part)
    assert len(names) == len([n for n in full(part).state_dict() if not n.endswith("position_ids")]) == count
    required = {n.canonical for n in SD15.names() if n.component == part and not n.optional}
    assert required <= {n.canonical for n in names}


def test_what_a_narrow_copy_may_have_beside_them_is_shortcuts() -> None:
    there = {(n.component, n.canonical) for part in ("unet", "vae", "text_encoder") for n in real(part)}
    more = [n for n in SD15.names() if (n.component, n.canonical) not in there]
    assert all(n.optional and ".conv_shortcut." in n.canonical for n in more)


def converted(part: str) -> dict[str, str]:
    """Return diffusers' name → single-file name, found by sending numbered tensors through diffusers' converter."""
    names = real(part)
    tagged = {n.single: torch.full((1, 1, 1, 1) if n.conv else (1,), i) for i, n in enumerate(names)}
    config = dict(full(part).config) if part != "text_encoder" else {}
    found = {
        "unet": lambda: stock.convert_ldm_unet_checkpoint(tagged, config),
        "vae": lambda: stock.convert_ldm_vae_checkpoint(tagged, config),
        "text_encoder": lambda: stock.convert_ldm_clip_checkpoint(tagged),
    }[part]()
    return {name: names[int(tensor.flatten()[0])].single for name, tensor in found.items()}


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_diffusers_converts_names_as_we_do(part: str) -> None:
    assert converted(part) == {n.canonical: n.single for n in real(part)}


def test_the_matrices_that_a_single_file_keeps_as_convolutions_are_those_of_the_vaes_attention() -> None:
    conv = {n.canonical for n in SD15.names() if n.conv}
    shapes = {name: tensor.dim() for name, tensor in full("vae").state_dict().items()}
    assert {name.rpartition(".attentions.0.")[2] for name in conv} == {
        f"{part}.weight" for part in ("to_q", "to_k", "to_v", "to_out.0")
    }
    assert {shapes[name] for name in conv} == {2}


def test_convolutions_are_told_by_their_names() -> None:
    shapes = {f"unet.{name}": tensor.dim() for name, tensor in full("unet").state_dict().items()}
    for module in SD15.modules():
        if module.startswith("unet.") and f"{module}.weight" in shapes:
            assert SD15.is_conv(module) == (shapes[f"{module}.weight"] == 4), module


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("conv_in.weight", "in00"),
        ("down_blocks.0.resnets.0.conv1.weight", "in01"),
        ("down_blocks.0.downsamplers.0.conv.weight", "in03"),
        ("down_blocks.1.attentions.1.proj_in.weight", "in05"),
        ("down_blocks.3.resnets.1.conv2.bias", "in11"),
        ("mid_block.resnets.1.norm1.weight", "mid"),
        ("up_blocks.0.upsamplers.0.conv.bias", "out02"),
        ("up_blocks.1.attentions.0.proj_out.weight", "out03"),
        ("up_blocks.3.resnets.2.conv2.weight", "out11"),
        ("conv_norm_out.weight", "out"),
        ("time_embedding.linear_2.bias", "time"),
    ],
)
def test_blocks_are_those_of_the_merge_programs(name: str, block: str) -> None:
    (found,) = (n for n in SD15.names() if (n.component, n.canonical) == ("unet", name))
    assert found.block == block
    if block[-2:].isdigit():
        side = "input" if block.startswith("in") else "output"
        assert f".{side}_blocks.{int(block[-2:])}." in found.single
