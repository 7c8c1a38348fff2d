"""Checkpoints and LoRAs of random numbers with the names and shapes of the real ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.networks import BIG_G, UNETS, VAE, VIT_L
from sdforge.families import family
from sdforge.formats.kohya import kohya_names, kohya_tensors
from sdforge.formats.safetensors import write_file
from sdforge.formats.single_file import single_pieces

RANK = 32
SPREAD = 0.02  # standard deviation of the weights; of what two checkpoints differ in a tenth of it
CRUMB = 8  # edge of a tensor that stands for one of full size
DRAWN = 1 << 25  # numbers that are drawn; a tensor takes some of them, from a place of its own


Shapes = dict[tuple[str, str], tuple[int, ...]]  # (component, canonical name) → shape


def shapes(name: str) -> Shapes:
    """Return (component, canonical name) → shape of a family's real checkpoint."""
    with torch.device("meta"):
        networks: dict[str, Any] = {
            "unet": UNet2DConditionModel(**UNETS[name]),
            "vae": AutoencoderKL(**VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**VIT_L)),
        }
        if name == "sdxl":
            networks["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**BIG_G))
    known = {(n.component, n.canonical) for n in family(name).names()}
    found = {}
    for component, network in networks.items():
        for key, tensor in network.state_dict().items():
            place = component, key
            if place not in known:  # some versions of transformers leave the first part of the name out
                place = component, f"text_model.{key}"
            if place in known:
                found[place] = tuple(tensor.shape)
    return found


def thin_shapes(name: str, each: int = 2) -> Shapes:
    """Return the shapes of a checkpoint that holds each shape of the real one, and crumbs of the rest.

    Of a network's tensors of one shape the first `each` stay as they are, the others have edges of at most CRUMB.
    """
    real, found = shapes(name), Shapes()
    met = Counter[tuple[str, tuple[int, ...]]]()
    pieces = single_pieces(family(name), {place: ("F16", shape) for place, shape in real.items()})
    for single in sorted(pieces, key=lambda single: ".middle_block." not in single):  # which tells the widths
        piece = pieces[single]
        kind = piece.parts[0][0], piece.shape
        met[kind] += 1
        for place in piece.parts:
            whole = met[kind] <= each and place[0] != "vae"  # of which nothing is merged
            found[place] = real[place] if whole else tuple(min(edge, CRUMB) for edge in real[place])
    return found


def write_checkpoint(path: Path, name: str, seed: int, own: Shapes | None = None) -> None:
    """Write a single file, fp16. Seed 0 is a base, from which all others differ a little. own: other shapes."""
    kind = family(name)
    pieces = single_pieces(kind, {place: ("F16", shape) for place, shape in (own or shapes(name)).items()})
    base, more = numbers(0, SPREAD), numbers(seed, SPREAD / 10)
    drawn = (base + more).half() if seed else base.half()
    starts = {single: 7919 * i % (DRAWN // 2) for i, single in enumerate(sorted(pieces))}

    def content(single: str) -> Iterator[memoryview]:
        left, start = 1, starts[single]
        for size in pieces[single].shape:
            left *= size
        while left:
            part = drawn[start : start + left]
            yield memoryview(part.view(torch.uint8).numpy())  # type: ignore[arg-type]
            left, start = left - part.numel(), 0

    write_file(path, {single: (piece.dtype, piece.shape) for single, piece in pieces.items()}, content)


def write_lora(path: Path, name: str) -> None:
    """Write a LoRA of rank 32 on attention and feed-forward layers of U-Net and text encoders, as kohya has them.

    Beside it, as JSON, which tensors of a single file its modules change.
    """
    kind = family(name)
    factors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for (component, tensor), shape in shapes(name).items():
        module = tensor.removesuffix(".weight")
        if module != tensor and len(shape) > 1 and _adapted(component, module):
            factors[f"{component}.{module}.lora_down"] = "F16", (RANK, *shape[1:])
            factors[f"{component}.{module}.lora_up"] = "F16", (shape[0], RANK)
    file = kohya_tensors(kind, factors, {})
    drawn = numbers(99, SPREAD).half()

    def content(key: str) -> list[Any]:
        if key in file.constant:
            return [file.constant[key]]
        size = 1
        for edge in file.shapes[key][1]:
            size *= edge
        start = 104_729 * len(key) % (DRAWN // 2)
        return [memoryview(drawn[start : start + size].view(torch.uint8).numpy())]  # type: ignore[arg-type]

    write_file(path, file.shapes, content, {"ss_network_module": "networks.lora"})
    modules = kohya_names(kind)
    places: dict[str, list[str]] = {}
    for each in sorted(kind.names(), key=lambda each: each.share):
        module = f"{each.component}.{each.canonical.removesuffix('.weight')}"
        if f"{module}.lora_up" in factors and each.canonical.endswith(".weight"):
            places.setdefault(each.single, []).append(modules[module])
    path.with_suffix(".json").write_text(json.dumps(places))


def _adapted(component: str, module: str) -> bool:
    if component == "unet":
        return "attentions" in module and "norm" not in module
    return component.startswith("text_encoder") and ("self_attn" in module or ".mlp." in module)


def numbers(seed: int, spread: float) -> torch.Tensor:
    """Return DRAWN random numbers of a standard deviation, of which tensors take some."""
    return torch.randn(DRAWN, generator=torch.Generator().manual_seed(seed)) * spread
