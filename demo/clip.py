"""A small CLIP for the demo's pictures: a vision model, and a projection for the text encoder of the flat base.

The text encoder does not change; vision model and both projections learn to bring a drawing and its caption together
(Radford et al. 2021, https://arxiv.org/abs/2103.00020, figure 3). Shapes in names: B pictures, D width of the shared
space (64), L tokens (77).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from demo.attributes import Attributes, training_caption
from demo.bases import TEXT_WIDTH, Base, read_weights, write_json, write_weights
from demo.progress import Clock, cosine_tail, device, generator, load_state, save_state, say
from demo.tokenizer import END

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from demo.picture_sets import Pictures

EDGE = 64  # pixels of the square that the vision model looks at
WIDTH = 64  # of the shared space
# OpenAI's, per channel of pictures in 0 … 1
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

STEPS, BATCH = 1500, 64
LEARNING_RATE = 2e-3
STYLES = ("flat", "ink", "chalk")
# The text encoder never learned the words for styles, so captions cannot teach the vision model to see them.
STYLE_LOSS_WEIGHT = 0.1

VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "projection_dim": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": EDGE,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
}


@dataclass(frozen=True)
class Drawings:
    """Pictures (uint8, N × 128 × 128 × 3), what each of them shows, and its style."""

    pictures: Pictures
    shown: list[Attributes]
    styles: list[str]


@dataclass
class Clip:
    """Vision model and text projection; `styles` reads the style while they are trained."""

    vision: CLIPVisionModelWithProjection
    text_projection: nn.Linear
    styles: nn.Linear

    def modules(self) -> dict[str, nn.Module]:
        """By name, as in a saved state."""
        return {"vision": self.vision, "text_projection": self.text_projection, "styles": self.styles}

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [parameter for module in self.modules().values() for parameter in module.parameters()]


def new_clip(seed: int = 0) -> Clip:
    """Untrained."""
    torch.manual_seed(seed)
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION))
    return Clip(vision, nn.Linear(TEXT_WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, len(STYLES)))


def see(pictures: Pictures) -> Tensor:
    """Return what the vision model takes (B, 3, 64, 64): scaled bicubically, normalised per channel."""
    scaled = [np.asarray(Image.fromarray(p).resize((EDGE, EDGE), Image.Resampling.BICUBIC)) for p in pictures]
    pixels = torch.from_numpy(np.stack(scaled)).permute(0, 3, 1, 2).float() / 255
    normalised: Tensor = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return normalised


@torch.no_grad()
def embed(clip: Clip, pictures: Pictures) -> Tensor:
    """Return the projected embeddings (N, D) of pictures, not normalised."""
    target = clip.text_projection.weight.device
    parts = [clip.vision(pixel_values=see(pictures[i : i + 64]).to(target)) for i in range(0, len(pictures), 64)]
    return torch.cat([part.image_embeds for part in parts]).cpu()


@torch.no_grad()
def read_texts(base: Base, captions: Sequence[str]) -> Tensor:
    """Return the text encoder's last states at the end of each caption (B, width of the text)."""
    ids_BL = torch.tensor(base.tokenizer.ids(captions), device=next(base.text_encoder.parameters()).device)
    ends_B = (ids_BL == base.tokenizer.id_of(END)).int().argmax(dim=1)
    states: Tensor = base.text_encoder(ids_BL).last_hidden_state
    return states[torch.arange(len(captions)), ends_B]


def train_clip(base: Base, drawings: Drawings, state_file: Path) -> Clip:
    """Train vision model and projections; goes on from a state. The projection is scaled at the end."""
    target = device()
    clip = new_clip()
    for module in (*clip.modules().values(), base.text_encoder):
        module.to(target)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    logit_scale = 1 / 0.07
    state = load_state(state_file) or {"step": 0, "seconds": 0.0}
    if state["step"]:
        for name, module in clip.modules().items():
            module.load_state_dict(state["clip"][name])
        optimizer.load_state_dict(state["optimizer"])
    clock = Clock(state["seconds"])
    pixels, styles = see(drawings.pictures), torch.tensor([STYLES.index(style) for style in drawings.styles])
    for step in range(state["step"], STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50) * cosine_tail(step / STEPS, flat=0.3, floor=0.02)
        rows = torch.randperm(len(pixels), generator=generator(30, step))[:BATCH]
        captions = _captions(drawings, rows.tolist(), step)
        image_BD = clip.vision(pixel_values=pixels[rows].to(target)).image_embeds
        text_BD = clip.text_projection(read_texts(base, captions))
        contrast = _contrastive(image_BD, text_BD, logit_scale)
        style = functional.cross_entropy(clip.styles(functional.normalize(image_BD)) * 10, styles[rows].to(target))
        optimizer.zero_grad()
        torch.autograd.backward(contrast + STYLE_LOSS_WEIGHT * style)
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        last = step + 1 == STEPS
        if (step + 1) % 50 == 0 or last:
            told = f"contrast {contrast.item():.3f}  style {style.item():.3f}"
            say(f"clip step {step + 1}/{STEPS}  {clock.seconds():.0f} s  {told}")
        if clock.time_to_save() or last:
            parts = {name: module.state_dict() for name, module in clip.modules().items()}
            saved = {"clip": parts, "optimizer": optimizer.state_dict(), "step": step + 1, "seconds": clock.seconds()}
            save_state(state_file, saved)
    clip.vision.eval()
    _scale(clip, drawings.pictures)
    return clip


def _captions(drawings: Drawings, rows: list[int], step: int) -> list[str]:
    """Return captions as bases are trained with them, but none empty: nothing can be told from that."""
    rng = random.Random(step)
    found = []
    for row in rows:
        text = ""
        while not text:
            text = training_caption(drawings.shown[row], drawings.styles[row], rng)
        found.append(text)
    return found


def _contrastive(image_BD: Tensor, text_BD: Tensor, logit_scale: float) -> Tensor:
    """Return the symmetric cross-entropy of telling which caption belongs to which picture."""
    logits_BB = logit_scale * functional.normalize(image_BD) @ functional.normalize(text_BD).T
    own_B = torch.arange(len(image_BD), device=image_BD.device)
    both = functional.cross_entropy(logits_BB, own_B) + functional.cross_entropy(logits_BB.T, own_B)
    return both / 2


@torch.no_grad()
def _scale(clip: Clip, pictures: Pictures) -> None:
    """Give embeddings a root mean square of 1, which no angle notices: a U-Net takes them as they are."""
    clip.vision.visual_projection.weight /= embed(clip, pictures[:500]).square().mean().sqrt()


def retrieved(base: Base, clip: Clip, drawings: Drawings, captions: Sequence[str]) -> tuple[float, float]:
    """Return the share of pictures whose own caption is the nearest of all, and of captions with their picture."""
    with torch.no_grad():
        image_BD = functional.normalize(embed(clip, drawings.pictures))
        texts = read_texts(base, captions)
        text_BD = functional.normalize(clip.text_projection(texts.to(clip.text_projection.weight.device)).cpu())
        near_BB = image_BD @ text_BD.T
    own_B = torch.arange(len(image_BD))
    return tuple(float((near.argmax(1) == own_B).float().mean()) for near in (near_BB, near_BB.T))  # type: ignore[return-value]


def vision_config() -> dict[str, Any]:
    """Return the vision model's configuration, as transformers writes it."""
    return {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model", **VISION}


def preprocessor_config() -> dict[str, Any]:
    """Return how pictures are prepared, as transformers writes it."""
    return {
        "crop_size": {"height": EDGE, "width": EDGE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(STD),
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": EDGE},
    }


def write_clip(folder: Path, clip: Clip, base: Base) -> None:
    """Write a CLIP folder as transformers does, with the text encoder and tokenizer that the projection is for."""
    text = {key.removeprefix("text_model."): value for key, value in base.text_encoder.state_dict().items()}
    state = {f"text_model.{key}": value for key, value in text.items()}
    state |= dict(clip.vision.state_dict())
    state["text_projection.weight"] = clip.text_projection.weight
    state["logit_scale"] = torch.log(torch.tensor(1 / 0.07))
    write_weights(folder / "model.safetensors", state)
    text_config = base.text_encoder.config.to_dict()
    keys = ("bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings",
            "num_attention_heads", "num_hidden_layers", "pad_token_id", "vocab_size")  # fmt: skip
    write_json(
        folder / "config.json",
        {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": WIDTH,
            "logit_scale_init_value": float(state["logit_scale"]),
            "text_config": {
                **{key: text_config[key] for key in keys},
                "model_type": "clip_text_model",
                "projection_dim": WIDTH,
            },
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
        },
    )
    write_json(folder / "preprocessor_config.json", preprocessor_config())
    base.tokenizer.write(folder)


def read_clip(folder: Path) -> Clip:
    """Read a CLIP folder that `write_clip` wrote, weights in fp32."""
    clip, state = new_clip(), read_weights(folder / "model.safetensors")
    clip.vision.load_state_dict(
        {key: value for key, value in state.items() if key.startswith(("vision_model.", "visual_projection."))}
    )
    clip.text_projection.weight.data = state["text_projection.weight"]
    clip.vision.eval()
    return clip


def describe(clip: Clip) -> str:
    """Return the number of weights, for the log."""
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in clip.modules().items()}
    return json.dumps(counts)
