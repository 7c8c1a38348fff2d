"""A loaded checkpoint as trainings and samplers see it, whatever its family.

A family's `load.py` builds one; nothing above asks which family it is. Shapes in names: B batch, C channels,
H W of latents, L tokens, D width of the text's hidden states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdforge.families import Family
from sdforge.run.noise import Schedule
from sdforge.run.tokens import Words


@dataclass
class Conditioning:
    """What a U-Net is told beside the noisy latents: hidden states of the text, and what its family adds."""

    hidden_BLD: Tensor
    added: dict[str, Tensor] = field(default_factory=dict)

    def take(self, rows: list[int]) -> Conditioning:
        """Return some rows, in that order."""
        return Conditioning(self.hidden_BLD[rows], {name: value[rows] for name, value in self.added.items()})

    def to(self, device: torch.device) -> Conditioning:
        return Conditioning(self.hidden_BLD.to(device), {name: value.to(device) for name, value in self.added.items()})

    @staticmethod
    def stack(parts: list[Conditioning]) -> Conditioning:
        """Return several as one batch."""
        added = {name: torch.cat([p.added[name] for p in parts]) for name in parts[0].added}
        return Conditioning(torch.cat([p.hidden_BLD for p in parts]), added)


class TokenTable(nn.Module):
    """A text encoder's token embedding with rows behind it that may be learned; the table itself never changes."""

    def __init__(self, table_VD: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(table_VD, requires_grad=False)
        self.rows: nn.Parameter | None = None
        self.further = nn.ParameterList()  # behind those

    def append(self, rows_ND: Tensor) -> nn.Parameter:
        """Put rows behind all that is there; return them as what may be trained, in fp32."""
        rows = nn.Parameter(rows_ND.detach().float().clone())
        if self.rows is None:
            self.rows = rows
        else:
            self.further.append(rows)
        return rows

    def forward(self, ids_BL: Tensor) -> Tensor:
        last = self.weight.shape[0] - 1
        found = functional.embedding(ids_BL.clamp_max(last), self.weight)
        if self.rows is None:
            return found
        rows_ND = torch.cat([self.rows, *self.further]) if len(self.further) else self.rows
        learned = functional.embedding((ids_BL - last - 1).clamp_min(0), rows_ND)
        return torch.where((ids_BL > last)[..., None], learned.to(found.dtype), found)


@dataclass
class Diffusion(ABC):
    """Networks, schedule and words of one checkpoint. All networks are frozen and in evaluation mode."""

    family: Family
    facts: dict[str, Any]
    unet: nn.Module
    text_encoders: dict[str, nn.Module]
    vae: nn.Module
    words: Words
    schedule: Schedule
    device: torch.device
    precision: torch.dtype = torch.float32

    @property
    def latent_scaling(self) -> float:
        return float(self.family.fact(self.facts, "latent_scaling"))

    @property
    def resolution(self) -> int:
        """The edge of a square picture, in pixels, that the checkpoint was made for."""
        return int(self.family.fact(self.facts, "resolution"))

    @abstractmethod
    def token_tables(self) -> dict[str, TokenTable]:
        """Return text encoder → its token embedding."""

    @abstractmethod
    def encode_text(self, prompts: list[str], *, clip_skip: int = 0) -> Conditioning:
        """Return what prompts say to the U-Net; gradients flow to learned rows."""

    def encode_negative(self, prompts: list[str], *, clip_skip: int = 0) -> Conditioning:
        """Return the other side of guidance."""
        return self.encode_text(prompts, clip_skip=clip_skip)

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Run networks in the training's precision."""
        if self.precision is torch.float32:
            yield
        else:
            with torch.autocast(self.device.type, self.precision):
                yield

    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, condition: Conditioning) -> Tensor:
        """Return the U-Net's prediction, fp32."""
        with self.arithmetic():
            out = self.unet(
                noisy_BCHW,
                timesteps_B,
                encoder_hidden_states=condition.hidden_BLD,
                added_cond_kwargs=condition.added or None,
                return_dict=False,
            )[0]
        result: Tensor = out.float()
        return result

    @torch.no_grad()
    def encode_picture(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the mean latents, scaled, of pictures in −1 … 1 (fp32: fp16 VAEs overflow)."""
        latents: Tensor = self.vae.encode(pixels_BCHW.to(self.device)).latent_dist.mode()  # type: ignore[operator]
        return latents.float() * self.latent_scaling

    @torch.no_grad()
    def decode_picture(self, latents_BCHW: Tensor) -> Tensor:
        """Return pictures in −1 … 1 for scaled latents."""
        pixels: Tensor = self.vae.decode(latents_BCHW / self.latent_scaling, return_dict=False)[0]  # type: ignore[operator]
        return pixels.float()
