"""One image embedding is all that is trained; the U-Net is told it in the place of whatever captions say.

Shapes in names: B pictures, D width of the image embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from sdforge.order import Order
from sdforge.run.adapter import Adapter, Batch, Group, Learned
from sdforge.run.diffusion import Conditioning, Diffusion
from sdforge.run.images import Picture, read_pixels

if TYPE_CHECKING:
    from sdforge.trainings.clip_inversion import ClipInversion


def begin(settings: ClipInversion, diffusion: Diffusion) -> Adapter:
    """Wait for the pictures: the embedding begins at what the encoder says of them."""
    return _Embedding(settings, diffusion)


@final
class _Embedding(Adapter):
    reads_captions = False

    def __init__(self, settings: ClipInversion, diffusion: Diffusion) -> None:
        self.settings, self.diffusion = settings, diffusion
        self.encoder = ""

    def prepare(self, order: Order, pictures: list[Picture]) -> None:
        self.encoder = order.the("on").identities.get("image_encoder", "")
        seen = {picture: self._see(picture) for picture in dict.fromkeys(pictures)}
        self.mean_1D = torch.cat([seen[picture] for picture in pictures]).mean(0, keepdim=True)
        self.image_1D = nn.Parameter(self.mean_1D.clone())
        self.diffusion.shown_1D = self.image_1D  # so that samples on the way are drawn from it

    @torch.no_grad()
    def _see(self, picture: Picture) -> Tensor:
        return self.diffusion.encode_image(read_pixels(picture, flip=False))

    def groups(self) -> list[Group]:
        rate = self.settings.learning_rate * float(self.mean_1D.square().mean().sqrt())
        return [Group({"image_embeds": self.image_1D}, rate, self.settings.weight_decay)]

    def condition(self, batch: Batch, text: Conditioning | None) -> Conditioning:  # noqa: ARG002 -- it has no say
        # said once, and shown to every picture of the batch
        return self.diffusion.imagine(self.image_1D).take([0] * len(batch.captions))

    def also(self, batch: Batch) -> Tensor | None:  # noqa: ARG002 -- it concerns no picture
        return self.settings.pull * (self.image_1D - self.mean_1D).square().sum()

    def learned(self) -> Learned:
        with torch.no_grad():
            told = self.diffusion.imagine(self.image_1D)
        # what a U-Net is told beside hidden states, which is what a bake folds into its weights
        tensors = {"image_embeds": self.image_1D.detach(), **told.added}
        facts: dict[str, object] = {"level": 0, "null": "zeros", "encoder": self.encoder}
        return Learned({"image_embedding": tensors}, facts, [("image_embeds", self.image_1D - self.mean_1D, None)])
