"""Draw the demo's data sets: `python -m demo.make_data`.

`mascot/` teaches a word (textual inversion): ten pictures of one character, captions with the placeholder {trigger}.
`one-mascot/` is one of them (DreamArtist), `three-mascots/` are three (CLIP inversion). `dusk/` are twelve faces in
violet and blue (aesthetic gradients). `sketches/` teaches a style (LoRA): twenty chalk drawings, captions in
ordinary words. `portrait.png` is a face that no base was shown (null-text inversion).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from demo.attributes import (
    ACCESSORIES,
    BACKGROUNDS,
    EXPRESSIONS,
    EYE_COLOURS,
    HAIR_COLOURS,
    HAIR_STYLES,
    PERSONS,
    Attributes,
    caption,
)
from demo.drawing import draw
from demo.palettes import CHALK, FLAT

if TYPE_CHECKING:
    from PIL import Image

TRIGGER = "{trigger}"  # the placeholder that a training replaces by its own word
SKETCHES = 20


# Mip, a cat from another star: all of its parts are among those that the bases can draw.
MASCOT = Attributes(
    expression="smiling",
    person="alien",
    hair="twin tails",
    hair_colour="purple",
    eye_colour="red",
    background="pink",
    accessory="cat ears",
)


# A combination that the bases' training held out.
PORTRAIT = Attributes(
    expression="smiling",
    person="girl",
    hair="twin tails",
    hair_colour="brown",
    eye_colour="purple",
    background="yellow",
    accessory="cat ears",
)


def one_mascot_picture() -> list[tuple[Image.Image, str]]:
    """The first of the mascot's drawings."""
    return mascot_pictures()[:1]


def three_mascot_pictures() -> list[tuple[Image.Image, str]]:
    """The first three of the mascot's drawings, with nothing said of them."""
    return [(picture, "") for picture, _ in mascot_pictures()[:3]]


def dusk_pictures() -> list[tuple[Image.Image, str]]:
    """Twelve faces, all else alike often, with blue or purple hair before a blue or purple ground."""
    pictures = []
    for index in range(12):
        shown = sketch_attributes(index)
        colours = {"hair_colour": ("purple", "blue")[index % 2], "background": ("blue", "purple")[index // 2 % 2]}
        pictures.append((draw(replace(shown, **colours), FLAT, 4_500_000 + index), ""))
    return pictures


def portrait() -> Image.Image:
    """A face whose caption is `caption(PORTRAIT)`."""
    return draw(PORTRAIT, FLAT, 5_500_000)


def mascot_pictures() -> list[tuple[Image.Image, str]]:
    """Ten drawings, each expression twice and each background at least once."""
    pictures = []
    for index in range(10):
        expression = EXPRESSIONS[index % len(EXPRESSIONS)]
        background = BACKGROUNDS[(3 * index + 4) % len(BACKGROUNDS)]
        article = "an" if expression[0] in "aeiou" else "a"
        text = f"flat drawing of {article} {expression} {TRIGGER}, {background} background"
        shown = replace(MASCOT, expression=expression, background=background)
        pictures.append((draw(shown, FLAT, 3_000_000 + index), text))
    return pictures


def sketch_attributes(index: int) -> Attributes:
    """Return the index-th sketch: steps coprime to the lists' lengths, so that few pairs of words repeat.

    Every background comes twice, and the two lightest, which chalk changes most, four times.
    """
    background = index if index < 2 * len(BACKGROUNDS) else index % 2
    return Attributes(
        expression=EXPRESSIONS[(2 * index) % len(EXPRESSIONS)],
        person=PERSONS[(index + index // 4) % len(PERSONS)],
        hair=HAIR_STYLES[(5 * index + 1 + index // 6) % len(HAIR_STYLES)],
        hair_colour=HAIR_COLOURS[(3 * index + index // 8) % len(HAIR_COLOURS)],
        eye_colour=EYE_COLOURS[(3 * index + index // 5) % len(EYE_COLOURS)],
        background=BACKGROUNDS[background % len(BACKGROUNDS)],
        accessory=ACCESSORIES[(2 * index + index // 5) % len(ACCESSORIES)],
    )


def sketch_pictures() -> list[tuple[Image.Image, str]]:
    """Twenty chalk drawings; nothing in their captions names the style, so it goes into all that is drawn."""
    shown = [sketch_attributes(index) for index in range(SKETCHES)]
    return [(draw(a, CHALK, 4_000_000 + index), caption(a, style=None)) for index, a in enumerate(shown)]


def write(folder: Path, pictures: list[tuple[Image.Image, str]]) -> None:
    """Write numbered PNG files and their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (picture, text) in enumerate(pictures, start=1):
        picture.save(folder / f"{number:02}.png", optimize=True)
        if text:
            (folder / f"{number:02}.txt").write_text(text + "\n")


def main() -> None:
    """Write all of them."""
    parser = argparse.ArgumentParser(description="Draw the demo's data sets.")
    parser.add_argument(
        "--out", type=Path, default=Path("recipes/data"), help="where mascot/, sketches/, … are written"
    )
    out = parser.parse_args().out
    write(out / "mascot", mascot_pictures())
    write(out / "one-mascot", one_mascot_picture())
    write(out / "three-mascots", three_mascot_pictures())
    write(out / "dusk", dusk_pictures())
    portrait().save(out / "portrait.png", optimize=True)
    write(out / "sketches", sketch_pictures())


if __name__ == "__main__":
    main()
