"""Toys with the true topology: a Stable Diffusion 1.x checkpoint of 300 kB with random weights, and drawings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

CAPTIONS = ("a red square of {trigger}", "a green square", "a blue square of {trigger}")
COLOURS = ((200, 30, 30), (30, 160, 40), (40, 60, 210))
WORDS = ("a", "an", "red", "green", "blue", "square", "of", "drawing", "girl", "boy", "flat", "ink", "background")
EDGE = 64  # pixels
WIDTH = 8  # of the text encoder


def write_checkpoint(folder: Path, seed: int = 0) -> None:
    """Write a diffusers folder with random weights in fp16."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    words = vocabulary()
    attention, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    unet: Any = UNet2DConditionModel(
        sample_size=EDGE // 8,
        block_out_channels=(4, 4, 8, 8),
        down_block_types=(attention, attention, attention, plain),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    vae: Any = AutoencoderKL(
        sample_size=EDGE,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=2,
    )
    text: Any = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words["vocab"]),
            hidden_size=WIDTH,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            projection_dim=WIDTH,
            bos_token_id=len(words["vocab"]) - 2,
            eos_token_id=len(words["vocab"]) - 1,
        )
    )
    for part, network in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        network.half().save_pretrained(folder / part)
    rename_text_encoder(folder / "text_encoder" / "model.safetensors")
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
    }
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", **parts})
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
    write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "PNDMScheduler", **schedule})
    (folder / "tokenizer").mkdir()
    write_json(folder / "tokenizer" / "vocab.json", words["vocab"])
    merges = "\n".join(["#version: 0.2", *words["merges"]])
    (folder / "tokenizer" / "merges.txt").write_text(merges + "\n")


def rename_text_encoder(path: Path) -> None:
    """Give a text encoder the names that files in the world have: transformers leaves `text_model.` out since 5.6."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    prefix = "text_model."
    named = {name if name.startswith(prefix) else prefix + name: tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in named.items() if "position_ids" not in name}, path)


def vocabulary() -> dict[str, Any]:
    """A CLIP vocabulary whose words are single tokens."""
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)] + [chr(i) for i in range(ord("!"), ord("A"))]
    merges: list[str] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append(f"{pieces[0]} {pieces[1]}")
            pieces[:2] = ["".join(pieces[:2])]
    merges = list(dict.fromkeys(merges))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}


def write_drawings(folder: Path) -> None:
    """Write three pictures with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (caption, colour) in enumerate(zip(CAPTIONS, COLOURS, strict=True)):
        picture = Image.new("RGB", (EDGE, EDGE), "white")
        picture.paste(colour, (8 + 4 * i, 8, 48, 56))
        picture.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption + "\n")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1))
