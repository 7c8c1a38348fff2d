"""What a picture shows, judged by its pixels alone: numpy and Pillow, no training, no torch.

Patches at known places (see `geometry`) are compared with the styles' own palettes in CIE Lab, where distances follow
the eye. The base's pictures and the average of two bases lie between the palettes, so the nearest colour still wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from demo.geometry import CORNER_PATCHES, FRINGE_PATCHES, IRIS_PATCHES, PORTRAIT, SKIN_PATCHES, TAIL_PATCHES, Box
from demo.palettes import CHALK, FLAT, INK, Colour, shade

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from PIL import Image

Array = npt.NDArray[np.float64]

# Share of an iris patch that must be iris-coloured before its vote counts; a winking eye stays below.
LEAST_IRIS_SHARE = 0.10
# CIE Lab distances below which a pixel counts as iris-coloured, hair-coloured, chalk-white.
IRIS_REACH = 30.0
HAIR_REACH = 22.0
CHALK_REACH = 16.0
# Of a patch where a tail hangs: our own twin tails fill at least 0.55 of it, other hair hardly ever so much.
LEAST_TAIL_SHARE = 0.40
# Of the portrait: outlines fill at least 0.097 of our own chalk drawings.
LEAST_CHALK_SHARE = 0.06


@dataclass(frozen=True)
class Found:
    """What the classifier saw."""

    hair_colour: str
    background: str
    eye_colour: str | None  # None if no open eye was found
    skin: str
    twin_tails: bool
    chalk: bool  # the style of the demo's LoRA: a dark ground of its palette, and chalk-white outlines


def lab_from_srgb(pixels: Array) -> Array:
    """CIE Lab (D65) of 8-bit sRGB values in 0..255; the last axis holds the three channels."""
    scaled = pixels / 255
    linear = np.where(scaled <= 0.04045, scaled / 12.92, ((scaled + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    relative = (linear @ to_xyz.T) / np.array([0.9505, 1.0, 1.089])
    root = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
    x, y, z = root[..., 0], root[..., 1], root[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


class _Colours:
    """Named colours in Lab; several may bear one name."""

    def __init__(self, named: Iterable[tuple[str, Colour]]) -> None:
        pairs = list(named)
        self.names = [name for name, _ in pairs]
        self.lab = lab_from_srgb(np.array([colour for _, colour in pairs], dtype=np.float64))

    def nearest(self, lab: Array) -> str:
        """Return the name of the colour nearest to one Lab colour."""
        return self.names[int(np.argmin(np.linalg.norm(self.lab - lab, axis=-1)))]


def _named(tables: Iterable[Mapping[str, Colour]]) -> list[tuple[str, Colour]]:
    return [(name, colour) for table in tables for name, colour in table.items()]


_ALL = (FLAT, INK, CHALK)
_GROUND = _Colours([(f"{look.name}/{name}", colour) for look in _ALL for name, colour in look.ground.items()])
_HAIR = _Colours(_named(look.hair for look in _ALL))
_SKIN = _Colours(_named(look.skin for look in _ALL))
_IRIS = _Colours(
    _named(look.iris for look in _ALL) + [(n, shade(c, 0.62)) for look in _ALL for n, c in look.iris.items()]
)
_CHALK_LINE = lab_from_srgb(np.array(CHALK.outline, dtype=np.float64))


def _patch(pixels: Array, box: Box) -> Array:
    return pixels[box.top : box.bottom, box.left : box.right].reshape(-1, 3)


def _median_lab(pixels: Array, boxes: Iterable[Box]) -> Array:
    return lab_from_srgb(np.median(np.concatenate([_patch(pixels, box) for box in boxes]), axis=0))


def _eye_colour(pixels: Array, skin_lab: Array) -> str | None:
    """Return the eye colour with most votes of iris-coloured pixels, over the eyes that are open."""
    votes = dict.fromkeys(FLAT.iris, 0.0)
    for box in IRIS_PATCHES:
        patch = _patch(pixels, box)
        lab = lab_from_srgb(patch)
        distance = np.linalg.norm(lab[:, None] - _IRIS.lab[None], axis=-1)
        to_skin = np.linalg.norm(lab - skin_lab, axis=-1)
        nearest = distance.argmin(axis=1)
        counted = (distance.min(axis=1) < np.minimum(IRIS_REACH, to_skin)) & (np.hypot(lab[:, 1], lab[:, 2]) > 12)
        if counted.mean() >= LEAST_IRIS_SHARE:
            for index in nearest[counted]:
                votes[_IRIS.names[index]] += 1 / counted.sum()
    best = max(votes, key=lambda name: votes[name])
    return best if votes[best] > 0 else None


def _twin_tails(pixels: Array, hair_lab: Array, ground_lab: Array) -> bool:
    """Return whether hair fills the places on both sides where twin tails hang."""
    shares = []
    for box in TAIL_PATCHES:
        lab = lab_from_srgb(_patch(pixels, box))
        to_hair, to_ground = (np.linalg.norm(lab - other, axis=-1) for other in (hair_lab, ground_lab))
        shares.append(float((to_hair < np.minimum(HAIR_REACH, to_ground)).mean()))
    return min(shares) >= LEAST_TAIL_SHARE


def _outlined_in_chalk(pixels: Array) -> bool:
    lab = lab_from_srgb(_patch(pixels, PORTRAIT))
    return float((np.linalg.norm(lab - _CHALK_LINE, axis=-1) < CHALK_REACH).mean()) >= LEAST_CHALK_SHARE


def classify(picture: Image.Image) -> Found:
    """Say what a 128×128 picture shows. It always names a hair colour, a background and a skin: the nearest."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    ground_lab = _median_lab(pixels, CORNER_PATCHES)
    hair_lab = _median_lab(pixels, FRINGE_PATCHES)
    skin_lab = _median_lab(pixels, SKIN_PATCHES)
    ground_style, background = _GROUND.nearest(ground_lab).split("/")
    return Found(
        hair_colour=_HAIR.nearest(hair_lab),
        background=background,
        eye_colour=_eye_colour(pixels, skin_lab),
        skin=_SKIN.nearest(skin_lab),
        twin_tails=_twin_tails(pixels, hair_lab, ground_lab),
        chalk=ground_style == CHALK.name and _outlined_in_chalk(pixels),
    )
