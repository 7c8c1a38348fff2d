"""A toy CLIP folder as transformers writes one, for the text encoder of the toys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.families.toys import VISION
from tests.families.workbench import TEXT, shaken, vocabulary


def write_clip(folder: Path, *, seed: int = 5, **changes: Any) -> Path:
    """Write a random CLIP, if it is not there yet; changes: of its text model's configuration."""
    if folder.exists():
        return folder
    from transformers import CLIPConfig, CLIPModel

    size = len(vocabulary()["vocab"])
    ids = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = CLIPConfig(
            text_config=TEXT | ids | changes, vision_config=VISION, projection_dim=VISION["projection_dim"]
        )
        shaken(CLIPModel(config), torch.float32).save_pretrained(folder)
    edge = VISION["image_size"]
    prepared = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "size": {"shortest_edge": edge}}
    prepared |= {"crop_size": {"height": edge, "width": edge}}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    return folder
