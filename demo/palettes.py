"""The colours and the manner of each style: flat, ink and chalk (the style of the demo's LoRA)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping

Colour = tuple[int, int, int]

SKINS = ("light", "tan", "brown", "dark", "green")
CLOTHS = ("coral", "navy", "cream")


@dataclass(frozen=True)
class Look:
    """How a style draws. Colours are 8-bit sRGB, widths are picture pixels."""

    name: str
    ground: Mapping[str, Colour]
    hair: Mapping[str, Colour]
    iris: Mapping[str, Colour]
    skin: Mapping[str, Colour]
    cloth: Mapping[str, Colour]
    extras: Mapping[str, Colour]  # hat, band, ribbon, frame, bulb, blush, tear, mouth, tongue, white, dark
    outline: Colour | None = None
    outline_width: float = 0.0
    disc: float = 0.0  # how much lighter the round ground behind the head is, 0..1
    shine: bool = False  # one bright stroke in the hair
    strands: bool = False  # lines in the hair
    hatching: bool = False  # lines in two corners, hatched cheeks
    doodles: bool = False  # small stars on the ground


def mix(a: Colour, b: Colour, share_of_b: float) -> Colour:
    """Return the colour between `a` (share 0) and `b` (share 1), in sRGB values."""
    return (
        round(a[0] + (b[0] - a[0]) * share_of_b),
        round(a[1] + (b[1] - a[1]) * share_of_b),
        round(a[2] + (b[2] - a[2]) * share_of_b),
    )


def shade(colour: Colour, factor: float) -> Colour:
    """Darker by `factor` (0 is black, 1 unchanged), leaning to blue-violet as painters' shadows do."""
    return (
        round(colour[0] * factor),
        round(colour[1] * factor * 0.97),
        round(min(255.0, colour[2] * (0.25 * factor + 0.75 * factor**0.5))),
    )


def _hex(code: str) -> Colour:
    return (int(code[0:2], 16), int(code[2:4], 16), int(code[4:6], 16))


def _table(**codes: str) -> dict[str, Colour]:
    return {name.replace("_", " "): _hex(code) for name, code in codes.items()}


def _mapped(table: Mapping[str, Colour], paper: Colour, grey: float) -> dict[str, Colour]:
    """Every colour printed on tinted paper, after it lost the share `grey` of its colourfulness."""

    def printed(colour: Colour) -> Colour:
        level = round(0.30 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2])
        muted = mix(colour, (level, level, level), grey)
        return (muted[0] * paper[0] // 255, muted[1] * paper[1] // 255, muted[2] * paper[2] // 255)

    return {name: printed(colour) for name, colour in table.items()}


_HAIR = _table(
    black="2D2B3D",
    brown="7B4A2C",
    blonde="F2B632",
    red="DB3A30",
    blue="2F6CE3",
    green="2C9C58",
    pink="F56FAE",
    purple="8447C9",
)
_IRIS = _table(blue="2E7BE6", green="21A558", brown="8A4B1F", red="DE2B3A", purple="9240D2")
_SKIN = _table(light="FFE2CF", tan="F3BF97", brown="BE7F55", dark="8C583B", green="74D6A2")
_CLOTH = _table(coral="E0655A", navy="4A6496", cream="F4F1E8")
_EXTRAS = _table(
    hat="2F3F6E", band="FFD257", ribbon="E8324A", frame="26243A", bulb="FFC928", blush="FF7E7E", tear="6FBDF5",
    mouth="8F2433", tongue="F27583", white="FFFFFF", dark="26203A",
)  # fmt: skip

FLAT = Look(
    name="flat",
    ground=_table(
        white="F3F1EC",
        yellow="FFDB52",
        blue="8CC5F8",
        green="9ADB8E",
        pink="FFB3CB",
        purple="BBA2F0",
        orange="FF9F57",
        gray="B4B9C3",
    ),
    hair=_HAIR,
    iris=_IRIS,
    skin=_SKIN,
    cloth=_CLOTH,
    extras=_EXTRAS,
    disc=0.55,
    shine=True,
)

_PAPER = _hex("FAF1E0")
INK = Look(
    name="ink",
    ground=_mapped(FLAT.ground, _hex("F8EDD8"), 0.22),
    hair=_mapped(_HAIR, _PAPER, 0.18),
    iris=_mapped(_IRIS, _PAPER, 0.10),
    skin=_mapped({**_SKIN, "light": _hex("FFF3E6"), "tan": _hex("F6D9BC")}, _PAPER, 0.20),
    cloth=_mapped(_CLOTH, _PAPER, 0.35),
    extras=_mapped(_EXTRAS, _PAPER, 0.25) | {"hat": _hex("6C6C78"), "dark": _hex("2A2430"), "frame": _hex("2A2430")},
    outline=_hex("2A2430"),
    outline_width=2.0,
    strands=True,
    hatching=True,
)

CHALK = Look(
    name="chalk",
    ground=_table(
        white="7F8A96",
        yellow="8A6C12",
        blue="1D4179",
        green="1C5F3A",
        pink="96305F",
        purple="4C2B86",
        orange="A9481A",
        gray="3A3E47",
    ),
    hair={name: mix(colour, (255, 250, 240), 0.12) for name, colour in _HAIR.items()},
    iris=_IRIS,
    skin={name: mix(colour, (255, 250, 240), 0.15) for name, colour in _SKIN.items()},
    cloth={name: mix(colour, (60, 60, 80), 0.25) for name, colour in _CLOTH.items()},
    extras=_EXTRAS,
    outline=_hex("FFF8E8"),
    outline_width=2.6,
    strands=True,
    doodles=True,
)

LOOKS = {look.name: look for look in (FLAT, INK, CHALK)}


def random_look(rng: random.Random) -> Look:
    """Return a style nobody asked for, with colours from anywhere: the autoencoder must fit styles that come later."""
    base = rng.choice((FLAT, INK, CHALK))

    def anywhere(table: Mapping[str, Colour], share: float) -> dict[str, Colour]:
        return {
            name: mix(colour, (rng.randrange(256), rng.randrange(256), rng.randrange(256)), share)
            for name, colour in table.items()
        }

    lined = rng.random() < 0.6
    return replace(
        base,
        name="random",
        ground=anywhere(base.ground, 0.7),
        hair=anywhere(base.hair, 0.5),
        iris=anywhere(base.iris, 0.4),
        skin=anywhere(base.skin, 0.3),
        cloth=anywhere(base.cloth, 0.6),
        extras=anywhere(base.extras, 0.2),
        outline=(rng.randrange(256), rng.randrange(256), rng.randrange(256)) if lined else None,
        outline_width=rng.uniform(1.4, 3.0) if lined else 0.0,
        disc=rng.choice((0.0, 0.4, -0.3)),
        shine=rng.random() < 0.5,
        strands=rng.random() < 0.5,
        hatching=rng.random() < 0.3,
        doodles=rng.random() < 0.4,
    )
