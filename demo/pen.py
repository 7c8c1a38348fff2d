"""A pen on paper: smooth shapes, strokes and ellipses, drawn large and loosely placed, then reduced."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from demo import geometry

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from demo.palettes import Colour

Point = tuple[float, float]

OVERSAMPLING = 4  # drawn at 4× and reduced, since Pillow's polygons have hard edges


@dataclass(frozen=True)
class Placement:
    """Where this drawing lies: scaled and turned about `geometry.CENTRE`, then shifted by (x, y) pixels."""

    shift: Point
    scale: float
    turn: float  # degrees

    def at(self, point: Point) -> Point:
        """Return the place on the enlarged sheet of a point given in picture pixels."""
        centre_x, centre_y = geometry.CENTRE
        cosine, sine = math.cos(math.radians(self.turn)), math.sin(math.radians(self.turn))
        x, y = (point[0] - centre_x) * self.scale, (point[1] - centre_y) * self.scale
        return (
            (centre_x + x * cosine - y * sine + self.shift[0]) * OVERSAMPLING,
            (centre_y + x * sine + y * cosine + self.shift[1]) * OVERSAMPLING,
        )


def random_placement(rng: random.Random) -> Placement:
    """Hand-drawn looseness within the bounds of `geometry`."""
    return Placement(
        shift=(
            rng.uniform(-geometry.MAX_SHIFT, geometry.MAX_SHIFT),
            rng.uniform(-geometry.MAX_SHIFT, geometry.MAX_SHIFT),
        ),
        scale=1 + rng.uniform(-geometry.MAX_SCALE, geometry.MAX_SCALE),
        turn=rng.uniform(-geometry.MAX_TURN, geometry.MAX_TURN),
    )


def curve(points: Sequence[Point], *, closed: bool = False, steps: int = 8) -> list[Point]:
    """Return a smooth line through `points` (Catmull–Rom spline), as `steps` short lines between two of them."""
    count = len(points)
    spans = count if closed else count - 1

    def point(index: int) -> Point:
        return points[index % count] if closed else points[min(max(index, 0), count - 1)]

    line: list[Point] = []
    for span in range(spans):
        before, start, end, after = point(span - 1), point(span), point(span + 1), point(span + 2)
        for step in range(steps):
            t = step / steps
            weights = (
                -0.5 * t + t**2 - 0.5 * t**3,
                1 - 2.5 * t**2 + 1.5 * t**3,
                0.5 * t + 2 * t**2 - 1.5 * t**3,
                -0.5 * t**2 + 0.5 * t**3,
            )
            corners = (before, start, end, after)
            line.append(
                (
                    sum(weight * corner[0] for weight, corner in zip(weights, corners, strict=True)),
                    sum(weight * corner[1] for weight, corner in zip(weights, corners, strict=True)),
                )
            )
    if not closed:
        line.append(points[-1])
    return line


def mirrored(points: Sequence[Point]) -> list[Point]:
    """Return the same points on the other side of the face, in reverse order, so that two halves join to one line."""
    return [(2 * geometry.CENTRE[0] - x, y) for x, y in reversed(points)]


def ring(centre: Point, radii: Point, *, start: float = 0.0, end: float = 360.0) -> list[Point]:
    """Points of an ellipse from angle `start` to `end`, degrees clockwise from the right."""
    steps = max(6, round(abs(end - start) / 10))
    angles = [math.radians(start + (end - start) * step / steps) for step in range(steps + 1)]
    return [(centre[0] + radii[0] * math.cos(angle), centre[1] + radii[1] * math.sin(angle)) for angle in angles]


class Pen:
    """Draws on a sheet of one ground colour. All coordinates and widths are picture pixels before placement."""

    def __init__(self, ground: Colour, placement: Placement, outline: Colour | None, outline_width: float) -> None:
        size = geometry.SIZE * OVERSAMPLING
        self._sheet = Image.new("RGB", (size, size), ground)
        self._draw = ImageDraw.Draw(self._sheet)
        self._placement = placement
        self._outline = outline
        self._outline_width = outline_width

    def fill(self, points: Sequence[Point], colour: Colour) -> None:
        """Draw a filled polygon without an outline."""
        self._draw.polygon([self._placement.at(point) for point in points], fill=colour)

    def shape(self, points: Sequence[Point], colour: Colour, *, weight: float = 1.0) -> None:
        """Draw a filled polygon with the style's outline, if it has one; `weight` scales the outline's width."""
        self.fill(points, colour)
        if self._outline is not None:
            self.stroke([*points, points[0]], self._outline, self._outline_width * weight)

    def stroke(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        """Draw a line with round ends and joints."""
        placed = [self._placement.at(point) for point in points]
        thick = max(1, round(width * self._placement.scale * OVERSAMPLING))
        self._draw.line(placed, fill=colour, width=thick, joint="curve")
        radius = thick / 2
        for x, y in (placed[0], placed[-1]):
            self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def dot(self, centre: Point, radii: Point, colour: Colour) -> None:
        """Draw a filled ellipse without an outline."""
        self.fill(ring(centre, radii), colour)

    def picture(self) -> Image.Image:
        """Return the finished drawing, 128×128 RGB."""
        return self._sheet.resize((geometry.SIZE, geometry.SIZE), Image.Resampling.LANCZOS)
