"""Where things are in a drawing: one place for the drawing, the classifier and the training masks.

Unit: picture pixels of a 128×128 drawing, x to the right, y down. A latent cell is 8×8 picture pixels; the eyes are
placed so that an iris fills 2×2 cells, because what is smaller than a cell is learned last.
"""

from __future__ import annotations

from typing import NamedTuple

SIZE = 128  # edge of a drawing, pixels
CELL = 8  # edge of a latent cell, pixels
CELLS = SIZE // CELL

# Hand-drawn looseness: how far a drawing may be moved, scaled and turned (about CENTRE).
MAX_SHIFT = 2.0  # pixels
MAX_SCALE = 0.03
MAX_TURN = 3.0  # degrees
CENTRE = (64.0, 74.0)

EYE_LEFT = (48.0, 72.0)  # "left" as the viewer sees it; this one is open also when the other winks
EYE_RIGHT = (80.0, 72.0)
IRIS_RADII = (7.2, 8.6)
MOUTH = (64.0, 91.0)


class Box(NamedTuple):
    """Half-open rectangle [left, right) × [top, bottom), in pixels or in latent cells."""

    left: int
    top: int
    right: int
    bottom: int


# Pixel patches that the classifier looks at.
CORNER_PATCHES = (Box(1, 1, 11, 13), Box(117, 1, 127, 13))
FRINGE_PATCHES = (Box(44, 43, 57, 49), Box(71, 43, 84, 49))
IRIS_PATCHES = (Box(42, 64, 55, 81), Box(74, 64, 87, 81))
SKIN_PATCHES = (Box(52, 82, 76, 87), Box(56, 76, 72, 83))
TAIL_PATCHES = (Box(7, 56, 15, 92), Box(113, 56, 121, 92))  # only twin tails hang here on both sides
PORTRAIT = Box(14, 20, 114, 100)  # whatever is outlined, without the doodles in the corners

# Latent cells that the U-Net's loss weights: they decide eye colour and expression, but are few.
EYE_CELLS = (Box(5, 8, 7, 10), Box(9, 8, 11, 10))
BROW_CELLS = (Box(4, 6, 7, 8), Box(9, 6, 12, 8))
MOUTH_CELLS = (Box(6, 10, 10, 13),)

FACE = Box(28, 40, 100, 104)  # pixels; the autoencoder's loss weights them
