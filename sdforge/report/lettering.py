r"""What is written on sheets of pictures: in Pillow's own font, so that a sheet has the same bytes on every machine.

That font draws ASCII and hardly anything else. What it lacks is spelled with what it has: `é` as `e`, Cyrillic, Greek,
kana and Hangul by their sounds, and what has no spelling here by its number, as TOML writes it (`\u732b`).
"""

from __future__ import annotations

import textwrap
import unicodedata
from functools import cache
from typing import Any

from PIL import ImageFont

NONE = "\uffff"  # no letter: what a font draws for one that it lacks
PAIRS = (  # a letter and how it is spelled
    "аa бb вv гg дd еe ёyo жzh зz иi йy кk лl мm нn оo пp рr сs тt уu фf хkh цts чch шsh щshch ъ ыy ь эe юyu яya "
    "іi їyi єye ґg ўw ђdj ѓgj јj љlj њnj ћc ќkj џdz ѕdz "
    "αa βb γg δd εe ζz ηi θth ιi κk λl μm νn ξx οo πp ρr σs ςs τt υy φf χch ψps ωo "
    "ßss æae œoe øo łl đd ðd þth ıi ŋng ×x ÷: €EUR £GBP ¥JPY ー- 、, 。. ・- „\" ‚' ′' ″\" −- •* →->"
)
SOUNDS = {pair[0]: pair[1:] for pair in PAIRS.split()}
SPELLED = ("HIRAGANA LETTER ", "KATAKANA LETTER ", "HANGUL SYLLABLE ")  # names of letters that end in their sounds
LIKE = {"Pd": "-", "Pi": '"', "Pf": '"', "Zs": " ", "Zl": " ", "Zp": " ", "Cc": " ", "Cf": "", "Mn": "", "Me": ""}


@cache
def font(size: int) -> Any:
    """Return the font of sheets; size: in pixels."""
    return ImageFont.load_default(size)


def readable(text: str) -> str:
    """Return a text in one line of letters that the font draws."""
    return "".join(map(_spelled, text))


def wrapped(text: str, size: int, letters: int, width: int) -> list[str]:
    """Return a text in lines of at most `letters`, of fewer where wide ones would take up more than `width` pixels."""
    lines = textwrap.wrap(readable(text), letters)
    while letters > 1 and any(font(size).getlength(line) > width for line in lines):
        letters -= 1
        lines = textwrap.wrap(readable(text), letters)
    return lines


@cache
def _spelled(letter: str) -> str:
    if (letter.isascii() and letter.isprintable()) or _shape(letter) != _shape(NONE):
        return letter
    if letter.lower() in SOUNDS:
        sound = SOUNDS[letter.lower()]
        return sound if letter.lower() == letter else sound.capitalize()
    kind, name = unicodedata.category(letter), unicodedata.name(letter, "")
    if kind in LIKE:
        return LIKE[kind]
    for start in SPELLED:
        if name.startswith(start):
            return name.removeprefix(start).rpartition(" ")[2].lower()
    if (parts := unicodedata.normalize("NFKD", letter)) != letter:
        return "".join(map(_spelled, parts))
    return f"\\u{ord(letter):04x}" if ord(letter) <= 0xFFFF else f"\\U{ord(letter):08x}"


@cache
def _shape(letter: str) -> tuple[tuple[int, int], bytes]:
    drawn = font(16).getmask(letter)
    return drawn.size, bytes(drawn)
