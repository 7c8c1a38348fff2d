"""The image encoder's names in a single file: OpenCLIP's own network takes them, and sees what transformers' sees."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from tests.families.toys import write_family
from tests.families.workbench import take
from tests.formats.conftest import export

VISUAL = {"unclip": "embedder.model.visual.", "image_variations": "cond_stage_model.model.visual."}


class QuickGelu(nn.Module):
    """The activation of OpenAI's own CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A residual block as CLIP's paper describes it (Radford et al. 2021, §2.4), with OpenCLIP's names."""

    def __init__(self, width: int, heads: int, inner: int, activation: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = {"c_fc": nn.Linear(width, inner), "gelu": activation, "c_proj": nn.Linear(inner, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        seen = self.ln_1(x)
        x = x + self.attn(seen, seen, seen, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Visual(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2020) that looks with its class token, with OpenCLIP's names."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, places = config.hidden_size, (config.image_size // config.patch_size) ** 2 + 1
        activation = QuickGelu() if config.hidden_act == "quick_gelu" else nn.GELU()
        blocks = [
            Block(width, config.num_attention_heads, config.intermediate_size, activation)
            for _ in range(config.num_hidden_layers)
        ]
        self.conv1 = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding, self.positional_embedding = (
            nn.Parameter(torch.empty(width)),
            nn.Parameter(torch.empty(places, width)),
        )
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*blocks)})
        self.proj = nn.Parameter(torch.empty(width, config.projection_dim))

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        patches_BPW = self.conv1(pixels_BCHW).flatten(2).transpose(1, 2)
        first_B1W = self.class_embedding.expand(len(patches_BPW), 1, -1)
        x = self.ln_pre(torch.cat([first_B1W, patches_BPW], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer["resblocks"](x)[:, 0]) @ self.proj


@pytest.mark.parametrize("name", VISUAL)
def test_openclip_s_network_takes_every_name_and_sees_the_same(name: str, toys: Path, tmp_path: Path) -> None:
    folder = write_family(toys / name, name)
    theirs = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder", dtype=torch.float32).eval()
    tensors = load_file(export(tmp_path, take(folder), ["checkpoint"], {}) / "checkpoint.safetensors")
    start = VISUAL[name]
    visual = Visual(theirs.config).eval()
    visual.load_state_dict({n.removeprefix(start): t.float() for n, t in tensors.items() if n.startswith(start)})
    edge = theirs.config.image_size
    pixels = torch.randn(2, 3, edge, edge, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = theirs(pixels).image_embeds, visual(pixels)
    assert torch.allclose(found, expected, atol=1e-5)
