"""A data set → latents and captions, in batches: buckets, order and dropout are functions of content and seed."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
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
from sdforge.pictures import UnreadablePicture, on_white, opened, size_of
from sdforge.run.derived import Derived, Recent
from sdforge.run.diffusion import Diffusion, Size
from sdforge.run.seeds import generator

STEP = 64  # pixels: what three halvings of the latents divide
READING = 2  # of pixels; raised when they come out otherwise, so that no latents are taken that were kept of others


@dataclass(frozen=True)
class Picture:
    """A picture of a data set in its bucket.

    size: width and height in pixels after resizing and cropping; original: before. mask: a picture that says how much
    every place counts, `alpha` for the picture's own alpha channel, or "" where all count alike.
    """

    path: str
    sha256: str
    caption: str
    size: tuple[int, int]
    original: tuple[int, int] = (0, 0)
    mask: str = ""

    @property
    def crop(self) -> tuple[int, int]:
        """What is cut off at the left and at the top, in pixels of the resized picture."""
        (width, height), (w, h) = self.size, self.original
        scale = max(width / w, height / h)
        return round((w * scale - width) / 2), round((h * scale - height) / 2)


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
    """Return (learned from, held out): the held-out pictures are the first by a digest of their content.

    A picture with several captions is held out with all of them.
    """
    first: dict[str, str] = {}
    for row in given.pictures:
        name = H("held-out", [row[1], row[2]])
        first[row[1]] = min(name, first.get(row[1], name))
    out = set(sorted(first, key=lambda sha256: (first[sha256], sha256))[: given.held_out])
    rows = sorted(given.pictures, key=lambda row: (first[row[1]], row[1], row[2]))
    return [row for row in rows if row[1] not in out], [row for row in rows if row[1] in out]


def plan_pictures(rows: list[list[Any]], resolution: int, *, buckets: bool) -> list[Picture]:
    """Return every picture as often as it is repeated, in an order that only its content decides."""
    sizes = bucket_sizes(resolution) if buckets else [(resolution, resolution)]
    pictures = []
    for path, sha256, caption, repeats, *mask in sorted(rows, key=lambda row: (row[1], row[2])):
        with _opened(path) as image:
            size = size_of(image)
        pictures += [Picture(path, sha256, caption, assign(size, sizes), size, *mask)] * repeats
    return pictures


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """Open a picture. Raises ActionFailed if it cannot be read, also where that shows only later, at its pixels."""
    try:
        with opened(path) as image:
            yield image
    except UnreadablePicture as error:
        raise ActionFailed(str(error)) from None


def read_pixels(picture: Picture, *, flip: bool) -> Tensor:
    """Return a picture's pixels (1, 3, H, W) in −1 … 1: turned upright, resized to cover its bucket, cropped."""
    with _opened(picture.path) as image:
        upright = on_white(ImageOps.exif_transpose(image))
        fitted = ImageOps.fit(upright, picture.size, Image.Resampling.LANCZOS)
    pixels_HWC = np.asarray(fitted, dtype=np.float32) / 127.5 - 1
    pixels_BCHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None]
    return pixels_BCHW.flip(3) if flip else pixels_BCHW


def read_mask(picture: Picture) -> Tensor:
    """Return how much every place of a picture's latents counts, (1, 1, H/8, W/8) in 0 … 1: the mean of its pixels.

    Raises ActionFailed for a mask that leaves nothing, and for one of another shape, which would lie beside what it is
    drawn for.
    """
    own = picture.mask == "alpha"
    with _opened(picture.path if own else picture.mask) as image:
        upright = ImageOps.exif_transpose(image)
        if not _alike(upright.size, picture.original):
            (w, h), (width, height) = upright.size, picture.original
            raise ActionFailed(
                f"the mask of {picture.path} has {w} × {h} pixels and the picture {width} × {height}",
                hint="a mask is as large as its picture, or smaller in the same shape",
            )
        plain = upright.convert("RGBA").getchannel("A") if own else upright.convert("L")
        fitted = ImageOps.fit(plain, picture.size, Image.Resampling.BOX)
    mask_BCHW = torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255)[None, None]
    small = torch.nn.functional.avg_pool2d(mask_BCHW, 8)
    if not bool(small.any()):
        raise ActionFailed(f"the mask of {picture.path} leaves nothing to learn from", hint="white is what counts")
    return small


def _alike(mask: Size, picture: Size) -> bool:
    """Say whether two sizes are of one shape, as far as whole pixels can be; nothing is known of a picture 0 × 0."""
    (w, h), (width, height) = mask, picture
    return not (width and height) or abs(w - h * width / height) <= 1 or abs(h - w * height / width) <= 1


def shuffled(caption: str, keep: int, draw: torch.Generator) -> str:
    """Return a caption with its parts (between commas) in another order; the first `keep` stay where they are."""
    parts = [part.strip() for part in caption.split(",")]
    order = torch.randperm(max(0, len(parts) - keep), generator=draw).tolist()
    return ", ".join([*parts[:keep], *(parts[keep + i] for i in order)])


class Latents:
    """Latents of pictures, encoded once and kept in the store under what they are made from."""

    def __init__(self, diffusion: Diffusion, given: Given, derived: Derived) -> None:
        self.diffusion, self.derived = diffusion, derived
        owners = diffusion.family.owners
        facts = {name: value for name, value in given.facts.items() if owners.get(name) == "vae"}
        self._vae: dict[str, Json] = {"vae": given.identities["vae"], "facts": facts, "reading": READING}
        self._recent = Recent[tuple[str, tuple[int, int], bool], Tensor](derived, lambda tensor: tensor.nbytes)

    def of(self, picture: Picture, *, flip: bool) -> Tensor:
        """Return (1, C, H/8, W/8), scaled."""
        return self._recent.get((picture.sha256, picture.size, flip), lambda: self._had(picture, flip=flip))

    def _had(self, picture: Picture, *, flip: bool) -> Tensor:
        name = H("latents", {**self._vae, "picture": picture.sha256, "size": list(picture.size), "flip": flip})
        found = self.derived.get(
            "latents", name, lambda: {"latents": self.diffusion.encode_picture(read_pixels(picture, flip=flip))}
        )
        return found["latents"]


@dataclass(frozen=True)
class Chosen:
    """What a step is shown: pictures of one bucket, whether each is mirrored, and its caption ("" where dropped)."""

    pictures: list[Picture]
    flips: list[bool]
    captions: list[str]


class Order:
    """Which pictures a step is shown. Any step can be asked for on its own, so resuming needs no position.

    Every bucket is a stream of rounds, each a permutation of its pictures, cut into whole batches. A lap is a round of
    all pictures; in it every bucket has the turns that have become due, in an order drawn for the lap. One that does
    not fill a batch has a turn only every so many laps: after as many steps as there are pictures, each has been shown
    as often as a batch is large.
    """

    def __init__(
        self,
        pictures: list[Picture],
        batch: int,
        seed: int,
        *,
        flip: bool,
        dropout: float,
        shuffle: bool = False,
        keep: int = 0,
    ) -> None:
        self.batch, self.seed, self.flip, self.dropout, self.shuffle, self.keep = (
            batch,
            seed,
            flip,
            dropout,
            shuffle,
            keep,
        )
        self.buckets: dict[tuple[int, int], list[Picture]] = {}
        for picture in pictures:
            self.buckets.setdefault(picture.size, []).append(picture)
        self._drawn: dict[str, tuple[int, Any]] = {}  # what was drawn last for a purpose, and for which time

    def at(self, step: int) -> Chosen:
        most = (step + 1 + len(self.buckets)) * self.batch // sum(map(len, self.buckets.values())) + 1
        lap = bisect_right(range(most + 1), step, key=lambda lap: sum(self._turns_before(lap).values())) - 1
        place = step - sum(self._turns_before(lap).values())
        size, turn = self._once("buckets", lap, self._turns_of)[place]
        pictures = [self._nth(size, turn * self.batch + i) for i in range(self.batch)]
        draw = torch.rand(2, self.batch, generator=generator(self.seed, "captions", step)).tolist()
        flips = [self.flip and u < 0.5 for u in draw[0]]
        said = [picture.caption for picture in pictures]
        if self.shuffle:
            mix = generator(self.seed, "shuffle", step)
            said = [shuffled(caption, self.keep, mix) for caption in said]
        captions = ["" if u < self.dropout else caption for u, caption in zip(draw[1], said, strict=True)]
        return Chosen(pictures, flips, captions)

    def _once(self, purpose: str, time: int, make: Callable[[torch.Generator, int], Any]) -> Any:
        """Return what is made of a purpose's random numbers for a time; the last is remembered, as steps follow."""
        if self._drawn.get(purpose, (-1,))[0] != time:
            self._drawn[purpose] = time, make(generator(self.seed, purpose, time), time)
        return self._drawn[purpose][1]

    def _turns_of(self, draw: torch.Generator, lap: int) -> list[tuple[tuple[int, int], int]]:
        """Return the batches of a lap in their order: of which bucket, and the how many-th of all its batches."""
        turn, end = self._turns_before(lap), self._turns_before(lap + 1)
        due = [size for size in turn for _ in range(end[size] - turn[size])]
        found = []
        for i in torch.randperm(len(due), generator=draw).tolist():
            found.append((due[i], turn[due[i]]))
            turn[due[i]] += 1
        return found

    def _turns_before(self, lap: int) -> dict[tuple[int, int], int]:
        """Return how many turns every bucket has had before a lap: its pictures so far, in batches.

        Rounded down, each from another fraction on, so that small buckets do not all come in one lap.
        """
        many = len(self.buckets)
        return {
            size: (lap * len(self.buckets[size]) * many + number * self.batch) // (self.batch * many)
            for number, size in enumerate(sorted(self.buckets))
        }

    def _nth(self, size: tuple[int, int], n: int) -> Picture:
        found = self.buckets[size]
        round_, place = divmod(n, len(found))
        order = self._once(
            f"order {size[0]}x{size[1]}", round_, lambda draw, _: torch.randperm(len(found), generator=draw)
        )
        return found[int(order[place])]


def describe(pictures: list[Picture]) -> str:
    """Return how many pictures are in which bucket, for the log."""
    counts: dict[tuple[int, int], int] = {}
    for picture in pictures:
        counts[picture.size] = counts.get(picture.size, 0) + 1
    return json.dumps({f"{w}x{h}": n for (w, h), n in sorted(counts.items())})
