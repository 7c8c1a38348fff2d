"""Stable unCLIP tensors → a `Diffusion`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from sdforge.families.load import common, no_image_encoder, see
from sdforge.families.unclip import FAMILY
from sdforge.order import Given
from sdforge.run.diffusion import Conditioning, Diffusion, Framing
from sdforge.run.noise import STEPS
from sdforge.run.tensors import load_component

LABELS = "class_labels"


@final
@dataclass
class StableUnclipLoaded(Diffusion):
    """A prompt's last hidden states; a vector [noised image embedding ; its noise level], zeros where none is shown.

    statistics: `mean` and `std` (1, D) of image embeddings, by which those are normalised before noise is added.
    """

    statistics: dict[str, Tensor] = field(default_factory=dict)

    def encode_text(self, prompts: list[str], *, clip_skip: int = 0) -> Conditioning:
        hidden_BLD = self.last_states(prompts, clip_skip)
        width = self.unet.class_embedding.linear_1.in_features  # type: ignore[union-attr]
        return Conditioning(hidden_BLD, {LABELS: torch.zeros(len(prompts), int(width), device=self.device)})  # type: ignore[arg-type]

    def silenced(self, condition: Conditioning, rows: list[bool]) -> Conditioning:  # noqa: ARG002
        return condition

    def sized(self, condition: Conditioning, sizes: list[Framing]) -> Conditioning:  # noqa: ARG002
        return condition

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        if self.image_encoder is None:
            raise no_image_encoder()
        return see(self.image_encoder, pixels_BCHW.to(self.device), antialias=True)

    def imagine(
        self,
        images_BD: Tensor,
        prompts: list[str] | None = None,
        *,
        level: int = 0,
        noise_BD: Tensor | None = None,
        clip_skip: int = 0,
    ) -> Conditioning:
        told = self.encode_text(prompts or [""] * len(images_BD), clip_skip=clip_skip)
        alpha = float(cosine_alphas()[level])
        # a single file has none, and other programs take these
        mean_1D, std_1D = self.statistics.get("mean", torch.zeros(1)), self.statistics.get("std", torch.ones(1))
        mean_1D, std_1D = mean_1D.to(self.device), std_1D.to(self.device)
        noised_BD = math.sqrt(alpha) * (images_BD.to(self.device).float() - mean_1D) / std_1D
        if noise_BD is not None:
            noised_BD = noised_BD + math.sqrt(1 - alpha) * noise_BD.to(self.device)
        levels_BD = sinusoid(level, images_BD.shape[1]).to(self.device).expand(len(images_BD), -1)
        labels = torch.cat([noised_BD * std_1D + mean_1D, levels_BD], 1)
        return Conditioning(told.hidden_BLD, {LABELS: labels})


def cosine_alphas() -> Tensor:
    """Return ᾱ_t of the cosine schedule (Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 17), fp64."""
    times = torch.arange(STEPS + 1, dtype=torch.float64) / STEPS
    curve = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - (1 - curve[1:] / curve[:-1]).clamp_max(0.999)).cumprod(0)


def sinusoid(level: int, width: int) -> Tensor:
    """Return the embedding (1, width) of a number: cosines, then sines, of falling frequency (Vaswani et al. 2017)."""
    half = width // 2
    angles = level * torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32) / half)
    return torch.cat([angles.cos(), angles.sin()])[None]


def load(given: Given, device: torch.device, precision: torch.dtype) -> Diffusion:
    """Build the networks of a checkpoint from an order's input. Raises UsageError if a part is missing.

    precision: of the frozen networks' arithmetic; their weights are kept in fp32 all the same.
    """
    statistics = load_component(given.components.get("image_normalizer", []), torch.float32)
    return StableUnclipLoaded(**common(FAMILY, given, device, precision), statistics=statistics)
