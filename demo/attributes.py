"""What a drawing shows, in words: the attributes, their captions, and which combinations training never sees."""

from __future__ import annotations

import hashlib
import random
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

EXPRESSIONS = ("smiling", "sad", "surprised", "winking", "angry")
PERSONS = ("girl", "boy", "elf", "alien")
HAIR_STYLES = ("short", "long", "spiky", "bob", "ponytail", "twin tails")
HAIR_COLOURS = ("black", "brown", "blonde", "red", "blue", "green", "pink", "purple")
EYE_COLOURS = ("blue", "green", "brown", "red", "purple")
BACKGROUNDS = ("white", "yellow", "blue", "green", "pink", "purple", "orange", "gray")
ACCESSORIES = ("none", "glasses", "hat", "ribbon", "cat ears")

# Words for the accessory in a caption; "none" is simply not mentioned.
ACCESSORY_CLAUSES = {
    "glasses": "wearing glasses",
    "hat": "wearing a hat",
    "ribbon": "wearing a red ribbon",
    "cat ears": "with cat ears",
}

# One combination in this many is kept out of all training, so that evaluation asks for what no training picture showed.
HELD_OUT_ONE_IN = 16


@dataclass(frozen=True)
class Attributes:
    """What the caption says about a drawing; the style (flat, ink, chalk) is not among it."""

    expression: str
    person: str
    hair: str
    hair_colour: str
    eye_colour: str
    background: str
    accessory: str

    @property
    def held_out(self) -> bool:
        """True if no training picture may show this combination; decided by a digest, so it is the same everywhere."""
        digest = hashlib.sha256("/".join(astuple(self)).encode()).digest()
        return digest[0] % HELD_OUT_ONE_IN == 0


def random_attributes(rng: random.Random) -> Attributes:
    """Any combination, each word alike likely."""
    return Attributes(
        expression=rng.choice(EXPRESSIONS),
        person=rng.choice(PERSONS),
        hair=rng.choice(HAIR_STYLES),
        hair_colour=rng.choice(HAIR_COLOURS),
        eye_colour=rng.choice(EYE_COLOURS),
        background=rng.choice(BACKGROUNDS),
        accessory=rng.choice(ACCESSORIES),
    )


def draw_combinations(seed: int, *, held_out: bool) -> Iterator[Attributes]:
    """Endless random combinations of the one kind: those for training, or those kept out of it."""
    rng = random.Random(seed)
    while True:
        attributes = random_attributes(rng)
        if attributes.held_out == held_out:
            yield attributes


def clauses(attributes: Attributes) -> list[str]:
    """Return the caption's parts: who (always first), then eyes, accessory and background."""
    article = "an" if attributes.expression[0] in "aeiou" else "a"
    colour, style = attributes.hair_colour, attributes.hair
    if style == "twin tails":
        hair = f"{colour} twin tails"
    elif style in ("bob", "ponytail"):
        hair = f"a {colour} {style}"
    else:
        hair = f"{style} {colour} hair"
    parts = [f"{article} {attributes.expression} {attributes.person} with {hair}", f"{attributes.eye_colour} eyes"]
    if attributes.accessory != "none":
        parts.append(ACCESSORY_CLAUSES[attributes.accessory])
    parts.append(f"{attributes.background} background")
    return parts


def caption(attributes: Attributes, style: str | None = "flat") -> str:
    """Return the full caption, e.g. "flat drawing of a sad boy with short red hair, blue eyes, white background".

    `style` None leaves out the words "... drawing of".
    """
    text = ", ".join(clauses(attributes))
    return f"{style} drawing of {text}" if style else text


def training_caption(attributes: Attributes, style: str, rng: random.Random) -> str:
    """Return the caption as training says it: 10 % empty, 20 % without the style, 15 % with one clause missing.

    Empty captions make classifier-free guidance possible; the others let a base understand short prompts.
    """
    if rng.random() < 0.10:
        return ""
    parts = clauses(attributes)
    if rng.random() < 0.15:
        parts.pop(rng.randrange(1, len(parts)))
    text = ", ".join(parts)
    return text if rng.random() < 0.20 else f"{style} drawing of {text}"
