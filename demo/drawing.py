"""Procedural drawings: a portrait from attributes, a look and a seed, always the same bytes (on the same Pillow).

Layers from back to front: ground, hair behind the head, antennae, body, ears, head, face, hair in front, brows,
accessory. Coordinates are picture pixels; see `geometry` for where the eyes and the mouth must be.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from demo import geometry
from demo.palettes import CLOTHS, Colour, Look, mix, shade
from demo.pen import Pen, Point, curve, mirrored, random_placement, ring

if TYPE_CHECKING:
    from PIL import Image

    from demo.attributes import Attributes

HUMAN_SKINS = ("light", "light", "tan", "tan", "brown", "dark")


def draw(attributes: Attributes, look: Look, seed: int) -> Image.Image:
    """Draw a 128×128 RGB portrait. The seed decides what no caption says: skin, cloth, doodles and looseness."""
    rng = random.Random(seed)
    skin = "green" if attributes.person == "alien" else rng.choice(HUMAN_SKINS)
    cloth = rng.choice(CLOTHS)
    pen = Pen(look.ground[attributes.background], random_placement(rng), look.outline, look.outline_width)
    artist = _Artist(pen, look, attributes, look.skin[skin], look.cloth[cloth])
    artist.draw(rng)
    return pen.picture()


class _Artist:
    """One portrait in the making; each method draws one layer."""

    def __init__(self, pen: Pen, look: Look, attributes: Attributes, skin: Colour, cloth: Colour) -> None:
        self.pen = pen
        self.look = look
        self.attributes = attributes
        self.skin = skin
        self.cloth = cloth
        self.hair = look.hair[attributes.hair_colour]
        self.iris = look.iris[attributes.eye_colour]
        # Without outlines, the hair's own darker tone must separate it from the ground.
        self.hair_behind = shade(self.hair, 0.78)
        # In black hair a darker line does not show, a lighter one does.
        dark_hair = sum(self.hair) < 200
        self.hair_line = mix(self.hair, (255, 255, 255), 0.25) if dark_hair else shade(self.hair, 0.72)

    def draw(self, rng: random.Random) -> None:
        """All layers, back to front."""
        self._ground(rng)
        self._hair_behind()
        if self.attributes.person == "alien":
            self._antennae()
        self._body()
        if self.attributes.person != "elf":
            self._round_ears()
        self._head()
        self._eyes()
        self._mouth()
        self._hair_in_front()
        if self.attributes.person == "elf":
            self._pointed_ears()
        self._brows()
        self._accessory()

    # Ground

    def _ground(self, rng: random.Random) -> None:
        ground = self.look.ground[self.attributes.background]
        if self.look.disc:
            tone = (255, 255, 255) if self.look.disc > 0 else (0, 0, 0)
            self.pen.dot((64, 70), (55, 55), mix(ground, tone, abs(self.look.disc)))
        if self.look.hatching:
            line = mix(ground, self.look.extras["dark"], 0.55)
            for step in range(4):
                reach = 8 + 8 * step
                self.pen.stroke([(-6, reach), (reach, -6)], line, 1.5)
                self.pen.stroke([(134, 128 - reach), (128 - reach, 134)], line, 1.5)
        if self.look.doodles:
            chalk = mix(ground, (255, 248, 232), 0.85)
            for x, y in ((10, 22), (118, 24), (9, 100), (119, 98), (22, 8), (107, 9)):
                centre = (x + rng.uniform(-3, 3), y + rng.uniform(-3, 3))
                self.pen.fill(_star(centre, rng.uniform(3.4, 5.0)), chalk)

    # Hair

    def _hair_behind(self) -> None:
        pen, behind = self.pen, self.hair_behind
        style = self.attributes.hair
        if style == "long":
            half = [(64, 26), (38, 31), (24, 52), (20, 84), (15, 108), (19, 121), (34, 124), (46, 118)]
            pen.shape(curve(half) + curve(mirrored(half)), behind)
        elif style == "bob":
            half = [(64, 26), (38, 31), (23, 56), (21, 84), (24, 99), (36, 104), (50, 102)]
            pen.shape(curve(half) + curve(mirrored(half)), behind)
        elif style == "spiky":
            tips = [(24, 78), (13, 71), (22, 62), (7, 50), (22, 44), (14, 27), (34, 30), (36, 11), (52, 23), (66, 5)]
            right = [(75, 22), (93, 10), (93, 29), (114, 26), (106, 44), (121, 51), (106, 62), (115, 72), (104, 78)]
            pen.shape([*tips, *right], self.hair)
        elif style == "ponytail":
            tail = [(90, 30), (104, 20), (118, 30), (122, 52), (118, 76), (108, 96), (105, 80), (107, 58), (98, 44)]
            pen.shape(curve(tail, closed=True), self.hair)
            pen.stroke(curve([(107, 33), (114, 48), (112, 70)]), self.hair_line, 1.6)
        elif style == "twin tails":
            tail = [(32, 40), (16, 38), (6, 54), (4, 78), (8, 98), (16, 112), (22, 98), (26, 80), (27, 58)]
            for side in (tail, mirrored(tail)):
                pen.shape(curve(side, closed=True), self.hair)
            for line in ([(17, 50), (12, 68), (14, 90)], [(111, 50), (116, 68), (114, 90)]):
                pen.stroke(curve(line), self.hair_line, 1.6)

    def _hair_in_front(self) -> None:
        pen = self.pen
        pen.shape(_CAPS[self.attributes.hair], self.hair)
        if self.look.strands:
            for line in (
                [(50, 30), (43, 37), (39, 44)],
                [(64, 28), (63, 36), (61, 42)],
                [(78, 30), (85, 37), (89, 44)],
            ):
                pen.stroke(curve(line), self.hair_line, 1.5)
        if self.look.shine:
            gloss = mix(self.hair, (255, 255, 255), 0.45)
            pen.stroke(curve([(38, 41), (43, 36), (51, 33)]), gloss, 2.6)
            pen.dot((57, 31.6), (1.5, 1.3), gloss)
        if self.attributes.hair in ("ponytail", "twin tails"):
            tie = self.look.extras["white"]
            knots = [(94, 33)] if self.attributes.hair == "ponytail" else [(31, 43), (97, 43)]
            for knot in knots:
                pen.shape(ring(knot, (4.2, 4.2)), tie, weight=0.8)

    # Body and head

    def _body(self) -> None:
        pen = self.pen
        half = [(64, 110), (52, 110), (38, 114), (28, 121), (24, 136)]
        neck = [(56, 98), (56, 113), (64, 118), (72, 113), (72, 98)]
        pen.shape(curve(half) + curve(mirrored(half)), self.cloth)
        pen.fill(neck, shade(self.skin, 0.86))
        if self.look.outline is not None:
            pen.stroke(
                [(56, 98), (56, 113), (64, 118), (72, 113), (72, 98)], self.look.outline, self.look.outline_width * 0.8
            )
        else:
            pen.stroke([(54, 110), (64, 119), (74, 110)], shade(self.cloth, 0.8), 2.0)

    def _round_ears(self) -> None:
        for x in (32.5, 95.5):
            self.pen.shape(ring((x, 75), (4.6, 6.2)), self.skin)
            self.pen.dot((x, 75.5), (2.2, 3.4), shade(self.skin, 0.82))

    def _pointed_ears(self) -> None:
        ear = [(33, 80), (24, 76), (15, 67), (8, 55), (20, 58), (30, 64), (34, 69)]
        inner = [(31, 76), (24, 72), (15, 61), (25, 64), (31, 69)]
        for outside, inside in ((ear, inner), (mirrored(ear), mirrored(inner))):
            self.pen.shape(curve(outside), self.skin)
            self.pen.fill(inside, shade(self.skin, 0.82))

    def _head(self) -> None:
        half = [(64, 34), (44, 38), (33, 54), (32, 74), (36, 89), (48, 99), (64, 103.5)]
        self.pen.shape(curve(half) + curve(mirrored(half)), self.skin)
        blush = mix(self.skin, self.look.extras["blush"], 0.55)
        for x in (40.5, 87.5):
            if self.look.hatching:
                for offset in (-3.0, 0.5, 4.0):
                    self.pen.stroke([(x + offset - 1, 89.5), (x + offset + 1, 85)], blush, 1.5)
            else:
                self.pen.dot((x, 87), (5.2, 3.4), blush)
        self.pen.stroke([(63.3, 82), (64.7, 82)], shade(self.skin, 0.72), 1.8)

    def _antennae(self) -> None:
        for side in (1, -1):
            stalk = [(64 - side * x, y) for x, y in ((26.0, 42.0), (36.0, 28.0), (42.0, 14.0))]
            self.pen.stroke(curve(stalk), self.look.outline or shade(self.skin, 0.8), 4.6 if self.look.outline else 3.2)
            if self.look.outline is not None:
                self.pen.stroke(curve(stalk), self.skin, 1.8)
            tip = stalk[-1]
            self.pen.shape(ring((tip[0], tip[1] - 2), (6.2, 6.2)), self.look.extras["bulb"])
            self.pen.dot((tip[0] - 1.8, tip[1] - 4), (1.7, 1.7), self.look.extras["white"])

    # Face

    def _eyes(self) -> None:
        self._open_eye(geometry.EYE_LEFT, outer_side=-1)
        if self.attributes.expression == "winking":
            self._winking_eye()
        else:
            self._open_eye(geometry.EYE_RIGHT, outer_side=1)

    def _open_eye(self, centre: Point, outer_side: int) -> None:
        pen, extras = self.pen, self.look.extras
        x, y = centre
        startled = self.attributes.expression == "surprised"
        white = (11.4, 12.6) if startled else (9.8, 10.2)
        iris_x, iris_y = (6.2, 7.2) if startled else geometry.IRIS_RADII
        pen.dot((x, y), white, extras["white"])
        pen.dot((x, y), (iris_x, iris_y), shade(self.iris, 0.62))
        pen.dot((x, y + 0.8), (iris_x - 1.3, iris_y - 1.3), self.iris)
        pen.dot((x, y + iris_y * 0.52), (iris_x * 0.55, iris_y * 0.33), mix(self.iris, (255, 255, 255), 0.35))
        pen.dot((x, y), (2.2, 2.6) if startled else (2.8, 3.6), extras["dark"])
        pen.dot((x - 2.6, y - 3.6), (2.4, 2.6), extras["white"])
        pen.dot((x + 2.8, y + 3.4), (1.3, 1.3), extras["white"])
        self._lids(centre, white, outer_side)

    def _lids(self, centre: Point, white: Point, outer_side: int) -> None:
        """Draw the upper lid, low over angry eyes' inner and sad eyes' outer corners; lashes but for boys."""
        pen, dark = self.pen, self.look.extras["dark"]
        x, y = centre
        width, height = white
        mood = self.attributes.expression
        inner, outer = {"angry": (5.0, -0.5), "sad": (-0.5, 4.5)}.get(mood, (0.0, 0.0))
        corners = [
            (x - outer_side * width, y - height * 0.42 + inner),
            (x - outer_side * width * 0.45, y - height * 0.93 + inner * 0.9),
            (x + outer_side * width * 0.45, y - height * 0.93 + outer * 0.9),
            (x + outer_side * width, y - height * 0.35 + outer),
        ]
        lid = curve(corners)
        if mood in ("angry", "sad"):
            above = [(x + outer_side * (width + 1), y - height - 2), (x - outer_side * (width + 1), y - height - 2)]
            pen.fill([*lid, *above], self.skin)
        pen.stroke(lid, dark, 2.8)
        if self.attributes.person != "boy":
            corner_x, corner_y = corners[-1]
            pen.stroke([(corner_x, corner_y), (corner_x + outer_side * 3.6, corner_y - 2.6)], dark, 2.0)
            pen.stroke([(corner_x, corner_y + 2), (corner_x + outer_side * 3.4, corner_y + 2)], dark, 1.6)

    def _winking_eye(self) -> None:
        x, y = geometry.EYE_RIGHT
        dark = self.look.extras["dark"]
        self.pen.stroke(
            curve([(x - 9.5, y + 3), (x - 5, y - 2.2), (x, y - 3.6), (x + 5, y - 2.2), (x + 9.5, y + 3)]), dark, 3.0
        )
        if self.attributes.person != "boy":
            self.pen.stroke([(x + 8.5, y + 1), (x + 12, y - 1)], dark, 1.8)

    def _brows(self) -> None:
        mood = self.attributes.expression
        # From the inner end to the outer end, for the right brow.
        ends: dict[str, list[Point]] = {
            "smiling": [(72, 57.5), (80, 54.5), (88, 57)],
            "winking": [(72, 57), (80, 54), (88, 57)],
            "surprised": [(72, 52.5), (80, 48.5), (88, 51.5)],
            "angry": [(69.5, 64), (78, 59), (89, 53.5)],
            "sad": [(70, 54), (79, 57.5), (90, 63)],
        }
        strong = 3.6 if mood in ("angry", "sad") else 2.6
        width = strong + (0.9 if self.attributes.person == "boy" else 0.0)
        colour = mix(shade(self.hair, 0.55), self.look.extras["dark"], 0.45)
        for brow in (ends[mood], mirrored(ends[mood])):
            self.pen.stroke(curve(brow), colour, width)

    def _mouth(self) -> None:
        pen, extras = self.pen, self.look.extras
        x, y = geometry.MOUTH
        dark = mix(extras["mouth"], extras["dark"], 0.5)
        mood = self.attributes.expression
        if mood == "smiling":
            bow = [(x - 8.5, y - 3), (x - 6.5, y + 2.4), (x, y + 5.6), (x + 6.5, y + 2.4), (x + 8.5, y - 3)]
            pen.fill(curve(bow), extras["mouth"])
            pen.fill(
                curve([(x - 5, y + 3.4), (x, y + 0.8), (x + 5, y + 3.4), (x, y + 5.4)], closed=True), extras["tongue"]
            )
            pen.stroke([*curve(bow), bow[0]], dark, 1.5)
        elif mood == "winking":
            pen.fill(
                curve([(x - 0.5, y + 0.6), (x + 0.4, y + 5.6), (x + 5.4, y + 5.2), (x + 6, y - 0.6)]), extras["tongue"]
            )
            pen.stroke(curve([(x - 8, y - 2.4), (x - 3, y + 0.8), (x + 3, y + 0.8), (x + 8, y - 3)]), dark, 2.2)
        elif mood == "surprised":
            pen.dot((x, y + 0.8), (4.8, 6.2), dark)
            pen.dot((x, y + 1.6), (3.4, 4.4), extras["mouth"])
        elif mood == "angry":
            teeth = [(x - 8.5, y + 4), (x - 5.5, y - 2.6), (x + 5.5, y - 2.6), (x + 8.5, y + 4)]
            pen.fill(teeth, extras["white"])
            pen.stroke([*teeth, teeth[0]], dark, 1.9)
            for step in (-3.2, 0.0, 3.2):
                pen.stroke([(x + step, y - 2), (x + step, y + 3.4)], dark, 1.0)
        else:
            pen.stroke(curve([(x - 7, y + 3), (x - 3.4, y - 0.8), (x + 3.4, y - 0.8), (x + 7, y + 3)]), dark, 2.4)
            drop = curve([(40, 80.5), (36.2, 88), (40, 92.6), (43.8, 88)], closed=True)
            pen.fill(drop, extras["tear"])
            pen.dot((38.8, 88), (1.2, 1.6), extras["white"])

    # Accessories

    def _accessory(self) -> None:
        match self.attributes.accessory:
            case "glasses":
                self._glasses()
            case "hat":
                self._hat()
            case "ribbon":
                self._ribbon()
            case "cat ears":
                self._cat_ears()

    def _glasses(self) -> None:
        pen, frame = self.pen, self.look.extras["frame"]
        for centre in (geometry.EYE_LEFT, geometry.EYE_RIGHT):
            pen.stroke(ring((centre[0], centre[1] + 1), (13.4, 13.4)), frame, 2.6)
        pen.stroke(curve([(61, 71), (64, 69.4), (67, 71)]), frame, 2.6)

    def _hat(self) -> None:
        pen, hat = self.pen, self.look.extras["hat"]
        crown = [(39, 33), (40, 20), (46, 10), (64, 7), (82, 10), (88, 20), (89, 33)]
        brim = [(18, 35), (38, 29), (64, 28), (90, 29), (110, 35), (90, 41.5), (64, 43), (38, 41.5)]
        pen.shape(curve(brim, closed=True), shade(hat, 0.82))
        pen.shape(curve(crown) + curve([(89, 33), (64, 37), (39, 33)]), hat)
        band = curve([(39.4, 25), (64, 29), (88.6, 25)]) + curve([(89, 33), (64, 37), (39, 33)])
        pen.fill(band, self.look.extras["band"])
        if self.look.outline is not None:
            pen.stroke([*curve(crown)], self.look.outline, self.look.outline_width)

    def _ribbon(self) -> None:
        pen, red = self.pen, self.look.extras["ribbon"]
        wing = [(64, 25), (55, 16), (44, 12), (42, 24), (44, 36), (55, 33)]
        for side in (wing, mirrored(wing)):
            pen.shape(curve(side, closed=True), red)
        for fold in ([(57, 24), (50, 23)], [(71, 24), (78, 23)]):
            pen.stroke(fold, shade(red, 0.72), 1.8)
        pen.shape(ring((64, 25), (5.4, 6)), shade(red, 0.82))

    def _cat_ears(self) -> None:
        pen = self.pen
        inside = mix(self.look.extras["tongue"], (255, 255, 255), 0.35)
        ear = [(32, 43), (30, 26), (32, 9), (44, 18), (55, 31)]
        lining = [(36, 37), (35, 26), (36, 16), (42, 23), (48, 31)]
        for outer, inner in ((ear, lining), (mirrored(ear), mirrored(lining))):
            pen.shape(curve(outer[:3]) + curve(outer[2:]), self.hair)
            pen.fill(inner, inside)


def _star(centre: Point, radius: float) -> list[Point]:
    outer = ring(centre, (radius, radius), start=-90, end=270)
    tips = [outer[round(step * (len(outer) - 1) / 5)] for step in range(5)]
    inner_ring = ring(centre, (radius * 0.45, radius * 0.45), start=-54, end=306)
    inner = [inner_ring[round(step * (len(inner_ring) - 1) / 5)] for step in range(5)]
    return [point for pair in zip(tips, inner, strict=True) for point in pair]


# The hair in front of the head: the outer line from the left temple over the top to the right one, then the fringe
# back to the left. Every fringe covers `geometry.FRINGE_PATCHES`.
_TOP: list[Point] = [(29, 66), (29, 48), (38, 33), (52, 27), (64, 25.5), (76, 27), (90, 33), (99, 48), (99, 66)]
_CAPS: dict[str, list[Point]] = {
    "short": curve([(30, 70), *_TOP[1:8], (98, 70)])
    + curve([(98, 70), (93, 62), (91, 55)])
    + curve([(91, 55), (82, 56), (72, 54), (64, 50)])
    + curve([(64, 50), (56, 55), (46, 56), (38, 54)])
    + curve([(38, 54), (36, 61), (30, 70)]),
    "long": curve([(24, 92), (27, 68), *_TOP[1:8], (101, 68), (104, 92)])
    + curve([(104, 92), (97, 82), (95, 66), (92, 58)])
    + curve([(92, 58), (82, 56), (70, 51), (64, 43)])
    + curve([(64, 43), (58, 51), (46, 56), (36, 58)])
    + curve([(36, 58), (33, 66), (31, 82), (24, 92)]),
    "spiky": [
        *curve([_TOP[0], (27, 50), (34, 35), (50, 26), (64, 24), (78, 26), (94, 35), (101, 50), _TOP[-1]]),
        (95, 54), (88, 61), (82, 52), (74, 61), (66, 51), (57, 61), (48, 52), (40, 61), (34, 54),
    ],
    "bob": curve([(26, 94), (24, 74), *_TOP[1:8], (104, 74), (102, 94)])
    + curve([(102, 94), (96, 92), (94, 76), (93, 57)])
    + curve([(93, 57), (78, 58.5), (64, 59), (50, 58.5), (35, 57)])
    + curve([(35, 57), (34, 76), (32, 92), (26, 94)]),
    "ponytail": curve([(31, 72), *_TOP[1:8], (97, 72)])
    + curve([(97, 72), (94, 62), (92, 52)])
    + curve([(92, 52), (84, 55), (74, 53), (68, 47)])
    + curve([(68, 47), (60, 55), (46, 60), (36, 58)])
    + curve([(36, 58), (34, 66), (31, 72)]),
    "twin tails": curve([(31, 74), *_TOP[1:8], (97, 74)])
    + curve([(97, 74), (95, 64), (90, 55)])
    + curve([(90, 55), (82, 59), (75, 53)])
    + curve([(75, 53), (69, 59), (64, 60), (59, 59), (53, 53)])
    + curve([(53, 53), (46, 59), (38, 55)])
    + curve([(38, 55), (33, 64), (31, 74)]),
}  # fmt: skip
