"""A loaded checkpoint as trainings and samplers see it, whatever its family.

A family's `load.py` builds one; nothing above asks which family it is. Shapes in names: B batch, C channels,
H W of latents, L tokens, D width of the text's hidden states.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdforge.errors import UsageError
from sdforge.families import Family
from sdforge.order import Given, Order
from sdforge.run.noise import Schedule
from sdforge.run.tokens import Words

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of frozen networks' arithmetic
Size = tuple[int, int]
Framing = tuple[Size, Size, Size]  # of a picture: its original (w, h), the crop's corner (x, y), the target (w, h)


@dataclass
class Conditioning:
    """What a U-Net is told beside the noisy latents: hidden states, and what its family adds.

    added: name → tensor whose rows are pictures: `class_labels`, and diffusers' `added_cond_kwargs`.
    """

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
    schedule: Schedule
    device: torch.device
    precision: torch.dtype = torch.float32
    vocabulary: Words | None = None
    image_encoder: nn.Module | None = None
    shown_1D: Tensor | None = None  # an image embedding from which all is drawn, where no other one is given

    @property
    def words(self) -> Words:
        """The vocabulary. Raises UsageError where a family has none."""
        if self.vocabulary is None:
            raise UsageError(f"{self.family.title} is shown a picture and understands no words")
        return self.vocabulary

    @property
    def latent_scaling(self) -> float:
        return float(self.family.fact(self.facts, "latent_scaling"))

    @property
    def resolution(self) -> int:
        """The edge of a square picture, in pixels, that the checkpoint was made for."""
        return int(self.family.fact(self.facts, "resolution"))

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance means something to the checkpoint."""
        return self.family.guided(self.facts)

    @abstractmethod
    def encode_text(self, prompts: list[str], *, clip_skip: int = 0) -> Conditioning:
        """Return what prompts say to the U-Net, of a picture of the checkpoint's own size and shown no other picture.

        clip_skip: layers left out before those that the family leaves out. Gradients flow to learned rows.
        """

    def encode_negative(self, prompts: list[str], *, clip_skip: int = 0) -> Conditioning:
        """Return the other side of guidance; an empty prompt is silent there."""
        return self.silenced(self.encode_text(prompts, clip_skip=clip_skip), [not prompt for prompt in prompts])

    @abstractmethod
    def silenced(self, condition: Conditioning, rows: list[bool]) -> Conditioning:
        """Let rows say nothing, as one side of guidance does: zeros in some families, the empty prompt's in others.

        rows: for each whether it is silenced. Those that are were made of an empty prompt.
        """

    @abstractmethod
    def sized(self, condition: Conditioning, sizes: list[Framing]) -> Conditioning:
        """Complete a conditioning, row by row, with the sizes of pictures; the same one where a family is told none."""

    @abstractmethod
    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the CLIP embedding (B, D) of pictures in −1 … 1 of any size. Raises UsageError where none is taken."""

    @abstractmethod
    def imagine(
        self,
        images_BD: Tensor,
        prompts: list[str] | None = None,
        *,
        level: int = 0,
        noise_BD: Tensor | None = None,
        clip_skip: int = 0,
    ) -> Conditioning:
        """Return what image embeddings (and prompts, default: empty) say to the U-Net; gradients flow to embeddings.

        clip_skip: as in `encode_text`, for the prompts.
        level, noise_BD: of the noise that a family adds to embeddings; no noise by default. Raises UsageError where a
        family takes no embedding.
        """

    def token_tables(self) -> dict[str, TokenTable]:
        """Return text encoder → its token embedding."""
        found = {}
        for name, encoder in self.text_encoders.items():
            table = text_model(encoder).embeddings.token_embedding
            assert isinstance(table, TokenTable)
            found[name] = table
        return found

    def token_ids(self, prompts: list[str], encoder: str) -> Tensor:
        """Return the numbers (B, L) that prompts are to a text encoder, filled up with its own word."""
        fact = self.family.tokenizers()[encoder.replace("text_encoder", "tokenizer")]
        padding = str(self.family.fact(self.facts, fact))
        return torch.tensor([self.words.encode(prompt, padding) for prompt in prompts], device=self.device)

    def last_states(self, prompts: list[str], clip_skip: int) -> Tensor:
        """Return the states (B, L, D) of the one text encoder, `clip_skip` layers left out, after its final norm."""
        ((name, encoder),) = self.text_encoders.items()
        ids = self.token_ids(prompts, name)
        with self.arithmetic():
            if clip_skip == 0:
                found: Tensor = encoder(input_ids=ids).last_hidden_state
                return found
            states = encoder(input_ids=ids, output_hidden_states=True).hidden_states
            normed: Tensor = text_model(encoder).final_layer_norm(states[-(clip_skip + 1)])
            return normed

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
        added = dict(condition.added)
        labels = added.pop("class_labels", None)
        with self.arithmetic():
            out = self.unet(
                noisy_BCHW,
                timesteps_B,
                encoder_hidden_states=condition.hidden_BLD,
                class_labels=labels,
                added_cond_kwargs=added or None,
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


def load_diffusion(order: Order, given: Given, precision: str = "fp32") -> Diffusion:
    """Return one of an order's checkpoints, ready on the order's device; precision: of `PRECISIONS`."""
    load = importlib.import_module(f"sdforge.families.{order.family}.load").load
    found: Diffusion = load(given, torch.device(order.how.get("device", "cpu")), PRECISIONS[precision])
    return found


def text_model(encoder: Any) -> Any:
    """Return the CLIP text model in an encoder: with a projection behind it, transformers nests it."""
    return getattr(encoder, "text_model", encoder)
