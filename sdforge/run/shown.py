"""What a step is shown: pictures of a data set as noisy latents, with captions and masks, and what is to be predicted.

Shapes: B pictures, C channels, H W of latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdforge.run.adapter import Adapter, Batch
from sdforge.run.diffusion import Diffusion
from sdforge.run.images import Latents, Order, Picture, read_mask
from sdforge.run.noise import STEPS
from sdforge.run.seeds import generator
from sdforge.run.views import View, mask_of, pixels_of
from sdforge.trainings import Training

Pairs = list[tuple[Picture, bool]]  # pictures, and whether each is mirrored


class Shown(NamedTuple):
    """A data set as the loop shows it.

    order: which of its pictures come at which step; stream: the name under which noises and timesteps are drawn;
    weight: of its loss; varies: whether the adapter says at every step how a picture is shown.
    """

    order: Order
    pictures: list[Picture]
    stream: str = "noise"
    weight: float = 1.0
    varies: bool = False


def in_order(pictures: list[Picture], settings: Training, seed: int) -> Order:
    """Return in which order a training is shown pictures."""
    return Order(
        pictures,
        settings.batch,
        seed,
        flip=settings.flip,
        dropout=settings.caption_dropout,
        shuffle=settings.shuffle,
        keep=settings.keep_tokens,
    )


class Batches:
    """Makes the batches of a training: each depends on (seed, step) alone."""

    def __init__(self, settings: Training, seed: int, adapter: Adapter, diffusion: Diffusion, latents: Latents) -> None:
        self.settings, self.seed, self.adapter, self.diffusion = settings, seed, adapter, diffusion
        self.latents = latents
        self._masks: dict[tuple[str, str, tuple[int, int]], Tensor] = {}

    def make(self, shown: Shown, step: int) -> Batch:
        """Return what a step is shown of a data set. Raises ActionFailed for a picture that cannot be read."""
        chosen = shown.order.at(step)
        pairs = list(zip(chosen.pictures, chosen.flips, strict=True))
        captions = chosen.captions
        masks_B1HW: Tensor | None
        if shown.varies:
            views = [self.adapter.view(picture, step) for picture in chosen.pictures]
            captions = [view.caption(caption) for view, caption in zip(views, captions, strict=True)]
            latents_BCHW, masks_B1HW = self._viewed(pairs, views)
        else:
            latents_BCHW = torch.cat([self.latents.of(picture, flip=flip) for picture, flip in pairs])
            masks_B1HW = self._weights(pairs)
        draw = generator(self.seed, shown.stream, step)
        noise_BCHW = torch.randn(latents_BCHW.shape, generator=draw)
        timesteps_B = torch.randint(self.settings.noise_from, STEPS, (len(captions),), generator=draw)
        if self.settings.noise_offset:
            level_BC11 = torch.randn(*latents_BCHW.shape[:2], 1, 1, generator=draw)
            noise_BCHW = noise_BCHW + self.settings.noise_offset * level_BC11
        numbers = (latents_BCHW, noise_BCHW, timesteps_B)
        latents_BCHW, noise_BCHW, timesteps_B = (_moved(tensor, self.diffusion.device) for tensor in numbers)
        schedule = self.diffusion.schedule
        return Batch(
            schedule.add_noise(latents_BCHW, noise_BCHW, timesteps_B),
            schedule.target(latents_BCHW, noise_BCHW, timesteps_B),
            timesteps_B,
            captions,
            masks_B1HW,
            chosen.pictures,
        )

    def mask(self, picture: Picture) -> Tensor:
        """Return the mask (1, 1, H, W) of a picture that has one, read once. Raises ActionFailed."""
        place = (picture.sha256, picture.mask, picture.size)
        if place not in self._masks:
            self._masks[place] = read_mask(picture)
        return self._masks[place]

    def _viewed(self, pairs: Pairs, views: list[View]) -> tuple[Tensor, Tensor]:
        """Return latents and masks of pictures as they are shown at one step."""
        shown = [(picture, view, flip) for (picture, flip), view in zip(pairs, views, strict=True)]
        with torch.no_grad():
            pixels_BCHW = torch.cat([pixels_of(picture, view, flip=flip) for picture, view, flip in shown])
            latents_BCHW = self.diffusion.encode_picture(pixels_BCHW)
        masks_B1HW = torch.cat([mask_of(picture, view, flip=flip) for picture, view, flip in shown])
        return latents_BCHW.cpu(), masks_B1HW.to(self.diffusion.device)

    def _weights(self, pairs: Pairs) -> Tensor | None:
        """Return how much every place counts, or None where no picture has a mask."""
        if not any(picture.mask for picture, _ in pairs):
            return None
        masks = []
        for picture, flip in pairs:
            width, height = picture.size
            mask = self.mask(picture) if picture.mask else torch.ones(1, 1, height // 8, width // 8)
            masks.append(mask.flip(3) if flip else mask)
        return torch.cat(masks).to(self.diffusion.device)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, without waiting for what a CUDA device still has to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
