"""A picture as it is shown at one step: smaller on grey ground, or closer, with words that say so and a mask.

Kumari et al. 2022, https://arxiv.org/abs/2212.04488, §4 and appendix: few pictures of one thing teach its size and
place with it, unless those vary. Everything happens in multiples of 8 pixels, one place of the latents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from sdforge.run.images import Picture, read_mask, read_pixels

PLACE = 8  # pixels of a place of the latents
SMALL = 2 / 3  # share of the steps at which a picture is shown smaller
SMALLEST = 1 / 3  # of its edges
FAR = 0.6  # below which words say that it is far away
CLOSER, CLOSEST = 1.2, 1.4
SAID_FAR, SAID_CLOSE = ("a far away ", "very small "), ("zoomed in ", "close up ")


@dataclass(frozen=True)
class View:
    """size: width and height after scaling; corner: of what is shown, in the scaled picture (negative: of the ground).

    said: what stands before the caption.
    """

    size: tuple[int, int]
    corner: tuple[int, int]
    said: str = ""

    def caption(self, caption: str) -> str:
        """Return what is said of the view; nothing of a picture of which nothing is said."""
        return self.said + caption if caption else ""


def draw_view(size: tuple[int, int], draw: torch.Generator) -> View:
    """Draw how a picture of this size (pixels, multiples of 8) is shown."""
    u = torch.rand(5, generator=draw, dtype=torch.float64).tolist()
    small = u[0] < SMALL
    low, high = (SMALLEST, 1.0) if small else (CLOSER, CLOSEST)
    scale = low + (high - low) * u[1]
    width, height = (max(3, round(edge * scale / PLACE)) * PLACE for edge in size)
    # where the smaller lies on the ground, or where in the larger one looks
    room = [(edge - whole) // PLACE for edge, whole in zip((width, height), size, strict=True)]
    x, y = (int(share * (abs(n) + 1)) * (1 if n > 0 else -1) for share, n in zip(u[2:4], room, strict=True))
    words = (SAID_FAR if scale < FAR else ()) if small else SAID_CLOSE
    return View((width, height), (x * PLACE, y * PLACE), words[int(u[4] * len(words))] if words else "")


def pixels_of(picture: Picture, view: View, *, flip: bool) -> Tensor:
    """Return the pixels (1, 3, H, W) in −1 … 1 of a view; grey where there is no picture."""
    scaled_BCHW = read_pixels(replace(picture, size=view.size), flip=flip)
    return _placed(scaled_BCHW, picture.size, view.corner)


def mask_of(picture: Picture, view: View, *, flip: bool) -> Tensor:
    """Return how much every place of a view's latents counts, (1, 1, H/8, W/8): not where grey is seen from there."""
    width, height = (edge // PLACE for edge in view.size)
    own = read_mask(replace(picture, size=view.size)) if picture.mask else torch.ones(1, 1, height, width)
    edges = picture.size[0] // PLACE, picture.size[1] // PLACE
    corner = view.corner[0] // PLACE, view.corner[1] // PLACE
    seen = _placed(own.flip(3) if flip else own, edges, corner)
    ground = 1 - _placed(torch.ones_like(own), edges, corner)
    return seen * (1 - functional.max_pool2d(ground, 3, stride=1, padding=1))


def _placed(content_BCHW: Tensor, size: tuple[int, int], corner: tuple[int, int]) -> Tensor:
    """Return what is seen of a content through a window of a size, whose corner lies at `corner` of it; 0 outside."""
    (width, height), (x, y) = size, corner
    seen = content_BCHW.new_zeros(*content_BCHW.shape[:2], height, width)
    part = content_BCHW[:, :, max(0, y) :, max(0, x) :][:, :, : height - max(0, -y), : width - max(0, -x)]
    top, left = max(0, -y), max(0, -x)
    seen[:, :, top : top + part.shape[2], left : left + part.shape[3]] = part
    return seen
