"""Tensors of SD image variations → a `Diffusion`."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from sdforge.errors import UsageError
from sdforge.families.image_variations import FAMILY
from sdforge.families.load import common, no_image_encoder, see
from sdforge.order import Given
from sdforge.run.diffusion import Conditioning, Diffusion, Framing


@final
class ImageVariationsLoaded(Diffusion):
    """One token, the image embedding; zeros for nothing. Words say nothing to it, and only empty prompts are taken."""

    def encode_text(self, prompts: list[str], *, clip_skip: int = 0) -> Conditioning:  # noqa: ARG002
        self._refuse_words(prompts)
        width = int(self.unet.config.cross_attention_dim)  # type: ignore[union-attr, arg-type]
        return Conditioning(torch.zeros(len(prompts), 1, width, device=self.device))

    def silenced(self, condition: Conditioning, rows: list[bool]) -> Conditioning:  # noqa: ARG002
        return condition

    def sized(self, condition: Conditioning, sizes: list[Framing]) -> Conditioning:  # noqa: ARG002
        return condition

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        if self.image_encoder is None:
            raise no_image_encoder()
        # "makes a big difference", says the card of the second version
        return see(self.image_encoder, pixels_BCHW.to(self.device), antialias=False)

    def imagine(
        self,
        images_BD: Tensor,
        prompts: list[str] | None = None,
        *,
        level: int = 0,  # noqa: ARG002
        noise_BD: Tensor | None = None,  # noqa: ARG002
        clip_skip: int = 0,  # noqa: ARG002
    ) -> Conditioning:
        self._refuse_words(prompts or [])
        return Conditioning(images_BD.to(self.device)[:, None])

    def _refuse_words(self, prompts: list[str]) -> None:
        if any(prompts):
            raise UsageError(
                f"{self.family.title} is shown a picture and understands no words", hint="leave the prompt empty"
            )


def load(given: Given, device: torch.device, precision: torch.dtype) -> Diffusion:
    """Build the networks of a checkpoint from an order's input. Raises UsageError if a part is missing.

    precision: of the frozen networks' arithmetic; their weights are kept in fp32 all the same.
    """
    return ImageVariationsLoaded(**common(FAMILY, given, device, precision))
