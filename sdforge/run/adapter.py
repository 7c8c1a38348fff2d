"""What is particular to a training method, and what the shared loop (`sdforge.run.train`) hands to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sdforge.order import Order
from sdforge.run.diffusion import Conditioning, Diffusion, Framing
from sdforge.run.images import Picture
from sdforge.run.views import View


@dataclass(frozen=True)
class Batch:
    """What a step (or a part of it) learns from. Shapes: B pictures, C channels, H W of latents.

    masks_B1HW: how much every place counts, 0 … 1, or None for all alike. pictures: what the latents are of.
    rows, whole: of a part that is computed by itself, which pictures of how many these are; otherwise nothing.
    """

    noisy_BCHW: Tensor
    target_BCHW: Tensor
    timesteps_B: Tensor
    captions: list[str]
    masks_B1HW: Tensor | None = None
    pictures: list[Picture] = field(default_factory=list)
    rows: tuple[int, ...] = ()
    whole: int = 0

    @property
    def framings(self) -> list[Framing]:
        """The sizes of the pictures, of which some families tell the U-Net."""
        return [(picture.original, picture.crop, picture.size) for picture in self.pictures]

    @property
    def dropped(self) -> list[bool]:
        """Whether the caption that a picture has was left out."""
        return [bool(picture.caption) and not said for picture, said in zip(self.pictures, self.captions, strict=True)]

    def part(self, start: int, end: int) -> Batch:
        """Return some of its pictures."""
        return Batch(
            self.noisy_BCHW[start:end],
            self.target_BCHW[start:end],
            self.timesteps_B[start:end],
            self.captions[start:end],
            None if self.masks_B1HW is None else self.masks_B1HW[start:end],
            self.pictures[start:end],
            tuple(range(len(self.captions)))[start:end],
            len(self.captions),
        )


def joined(batches: Sequence[Batch]) -> Batch:
    """Return batches of one shape as one, for one pass through the networks; masks are left out."""
    return Batch(
        torch.cat([b.noisy_BCHW for b in batches]),
        torch.cat([b.target_BCHW for b in batches]),
        torch.cat([b.timesteps_B for b in batches]),
        [caption for b in batches for caption in b.captions],
        pictures=[picture for b in batches for picture in b.pictures],
        rows=tuple(i * b.whole + row for i, b in enumerate(batches) for row in b.rows),
        whole=sum(b.whole for b in batches),
    )


@dataclass
class Group:
    """Parameters that share a learning rate and weight decay."""

    parameters: dict[str, nn.Parameter]
    learning_rate: float
    weight_decay: float


@dataclass
class Learned:
    """What a training saves: component → name → tensor, the artifact's facts, and the update for the sketch.

    update: (name, matrix, None), or (name, up, down) for their product; a matrix may be made when its turn comes.
    """

    components: dict[str, dict[str, Tensor]]
    facts: dict[str, Any] = field(default_factory=dict)
    update: Sequence[tuple[str, Tensor | Callable[[], Tensor], Tensor | None]] = ()


class Adapter(ABC):
    """What is particular to a training method. Made by `begin(settings, diffusion)` of its `adapter` module."""

    diffusion: Diffusion
    text_is_frozen: bool = True  # then what captions say is encoded once
    varies: bool = False  # whether `view` says at every step how a picture is shown; else it is encoded once
    static: bool = True  # whether every step computes with the same shapes, as far as pictures have them
    reads_captions: bool = True  # else nothing of them is encoded

    def prepare(self, order: Order, pictures: list[Picture]) -> None:  # noqa: B027 -- most have nothing to prepare
        """Look at the order's inputs before the first step. Whatever comes of it depends on contents alone."""

    def view(self, picture: Picture, step: int) -> View:
        """Return how a picture of the data set (never of the prior) is shown at a step, where that varies."""
        raise NotImplementedError

    def begins(self, step: int) -> None:  # noqa: B027 -- most have nothing to do
        """Get ready for a step: what is drawn at random for it depends on its number."""

    def caption(self, caption: str) -> str:
        """Return what is said of a picture of the data set, by its caption there."""
        return caption

    @abstractmethod
    def groups(self) -> list[Group]:
        """Return the parameters that are trained."""

    @abstractmethod
    def learned(self) -> Learned:
        """Return what has been learned so far."""

    def condition(self, batch: Batch, text: Conditioning | None) -> Conditioning:  # noqa: ARG002 -- others look
        """Return what the U-Net is told of a batch; text: what its captions say, None where nothing is encoded."""
        assert text is not None, "a base without text needs a method that says what conditions it"
        return text

    def predict(self, batch: Batch, condition: Conditioning) -> Tensor:
        """Return the prediction (B, C, H, W) that the loss compares with the target."""
        return self.diffusion.predict(batch.noisy_BCHW, batch.timesteps_B, condition)

    def also(self, batch: Batch) -> Tensor | None:  # noqa: ARG002 -- for those that have something to add
        """Return what is added to the loss of a batch beside the diffusion loss (a mean over its pictures)."""
        return None

    def stepped(self, step: int) -> None:  # noqa: B027 -- most have nothing to do
        """Do what has to be done after every update (a norm that is kept, …)."""
