"""A data set → latents and captions, in batches: buckets, order and dropout are functions of content and seed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sdforge.errors import ActionFailed
from sdforge.identity import H, Json
from sdforge.order import Given
from sdforge.run.derived import Derived
from sdforge.run.diffusion import Diffusion
from sdforge.run.seeds import generator

STEP = 64  # pixels: what three halvings of the latents divide
Image.MAX_IMAGE_PIXELS = 200_000_000


@dataclass(frozen=True)
class Picture:
    """A picture of a data set in its bucket: width and height in pixels after resizing and cropping."""

    path: str
    sha256: str
    caption: str
    size: tuple[int, int]


def bucket_sizes(resolution: int) -> list[tuple[int, int]]:
    """Return the shapes (width, height) of at most resolution² pixels, edges from half to twice the resolution.

    For every width the largest fitting height, both multiples of 64 (kohya's rule).
    """
    area = resolution * resolution
    least, most = max(STEP, resolution // 2 // STEP * STEP), resolution * 2 // STEP * STEP
    sizes = {(resolution, resolution)}
    for width in range(least, most + STEP, STEP):
        height = min(most, area // width // STEP * STEP)
        if height >= least:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def assign(size: tuple[int, int], sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the bucket whose aspect ratio is nearest to a picture's; of equals, the largest."""
    ratio = size[0] / size[1]
    return min(sizes, key=lambda s: (abs(s[0] / s[1] - ratio), -s[0] * s[1], s))


def split(given: Given) -> tuple[list[list[Any]], list[list[Any]]]:
    """Return (learned from, held out): the held-out pictures are the first by a digest of their content."""
    rows = sorted(given.pictures, key=lambda row: (H("held-out", [row[1], row[2]]), row[1], row[2]))
    return rows[given.held_out :], rows[: given.held_out]


def plan_pictures(rows: list[list[Any]], resolution: int, *, buckets: bool) -> list[Picture]:
    """Return every picture as often as it is repeated, in an order that only its content decides."""
    sizes = bucket_sizes(resolution) if buckets else [(resolution, resolution)]
    pictures = []
    for path, sha256, caption, repeats in sorted(rows, key=lambda row: (row[1], row[2])):
        with _opened(path) as image:
            size = image.size
            if image.getexif().get(0x0112, 1) >= 5:  # EXIF: turned by a quarter
                size = (size[1], size[0])
        pictures += [Picture(path, sha256, caption, assign(size, sizes))] * repeats
    return pictures


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """Open a picture. Raises ActionFailed if it cannot be read, also where that shows only later, at its pixels."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ActionFailed(f"{path} is no picture that can be read: {error}") from None


def read_pixels(picture: Picture, *, flip: bool) -> Tensor:
    """Return a picture's pixels (1, 3, H, W) in −1 … 1: turned upright, resized to cover its bucket, cropped."""
    with _opened(picture.path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("RGBA", "LA", "P"):
            ground = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(ground, upright.convert("RGBA"))
        fitted = ImageOps.fit(upright.convert("RGB"), picture.size, Image.Resampling.LANCZOS)
    pixels_HWC = np.asarray(fitted, dtype=np.float32) / 127.5 - 1
    pixels_BCHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None]
    return pixels_BCHW.flip(3) if flip else pixels_BCHW


class Latents:
    """Latents of pictures, encoded once and kept in the store under what they are made from."""

    def __init__(self, diffusion: Diffusion, given: Given, derived: Derived) -> None:
        self.diffusion, self.derived = diffusion, derived
        owners = diffusion.family.owners
        facts = {name: value for name, value in given.facts.items() if owners.get(name) == "vae"}
        self._vae: dict[str, Json] = {"vae": given.identities["vae"], "facts": facts}
        self._kept: dict[tuple[str, tuple[int, int], bool], Tensor] = {}

    def of(self, picture: Picture, *, flip: bool) -> Tensor:
        """Return (1, C, H/8, W/8), scaled."""
        place = (picture.sha256, picture.size, flip)
        if place not in self._kept:
            name = H("latents", {**self._vae, "picture": picture.sha256, "size": list(picture.size), "flip": flip})
            self._kept[place] = self.derived.get(
                "latents", name, lambda: {"latents": self.diffusion.encode_picture(read_pixels(picture, flip=flip))}
            )["latents"]
        return self._kept[place]


@dataclass(frozen=True)
class Chosen:
    """What a step is shown: pictures of one bucket, whether each is mirrored, and its caption ("" where dropped)."""

    pictures: list[Picture]
    flips: list[bool]
    captions: list[str]


class Order:
    """Which pictures a step is shown. Any step can be asked for on its own, so resuming needs no position.

    Every bucket is a stream of rounds, each a permutation of its pictures, cut into whole batches; in a lap every
    bucket has its turns in proportion to its size, in an order drawn for the lap.
    """

    def __init__(self, pictures: list[Picture], batch: int, seed: int, *, flip: bool, dropout: float) -> None:
        self.batch, self.seed, self.flip, self.dropout = batch, seed, flip, dropout
        self.buckets: dict[tuple[int, int], list[Picture]] = {}
        for picture in pictures:
            self.buckets.setdefault(picture.size, []).append(picture)
        self._turns = {size: -(-len(found) // batch) for size, found in self.buckets.items()}
        self._lap = [size for size in sorted(self.buckets) for _ in range(self._turns[size])]

    def at(self, step: int) -> Chosen:
        lap, place = divmod(step, len(self._lap))
        order = torch.randperm(len(self._lap), generator=generator(self.seed, "buckets", lap)).tolist()
        size = self._lap[order[place]]
        turn = sum(self._lap[i] == size for i in order[:place]) + lap * self._turns[size]
        pictures = [self._nth(size, turn * self.batch + i) for i in range(self.batch)]
        draw = torch.rand(2, self.batch, generator=generator(self.seed, "captions", step)).tolist()
        flips = [self.flip and u < 0.5 for u in draw[0]]
        captions = ["" if u < self.dropout else p.caption for u, p in zip(draw[1], pictures, strict=True)]
        return Chosen(pictures, flips, captions)

    def _nth(self, size: tuple[int, int], n: int) -> Picture:
        found = self.buckets[size]
        round_, place = divmod(n, len(found))
        order = torch.randperm(len(found), generator=generator(self.seed, f"order {size[0]}x{size[1]}", round_))
        return found[int(order[place])]


def describe(pictures: list[Picture]) -> str:
    """Return how many pictures are in which bucket, for the log."""
    counts: dict[tuple[int, int], int] = {}
    for picture in pictures:
        counts[picture.size] = counts.get(picture.size, 0) + 1
    return json.dumps({f"{w}x{h}": n for (w, h), n in sorted(counts.items())})
