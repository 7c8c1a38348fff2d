"""Slips of the pen in TOML: what the reader says of them, in words that tell the way out."""

from __future__ import annotations

import re
from typing import NamedTuple

NUMBERS = "numbers are written 5, 0.5 or 1e-4"
SWITCHES = ("true", "false", "yes", "no", "on", "off", "none", "null")


class Slip(NamedTuple):
    """A complaint about a line. column: from 1; length: how many letters the caret covers."""

    sentence: str
    column: int
    length: int = 1
    hint: str = ""


def explain_slip(sentence: str, line: str, column: int) -> Slip:
    """Return what tomli's complaint about a column of a line means for who wrote it."""
    key = re.match(r"\s*(\[\[?[^\]]*\]\]?|[^=]*[^=\s])", line)
    start, length = (key.start(1) + 1, len(key[1])) if key else (column, 1)
    if sentence.startswith("cannot declare"):
        return Slip(f"{line.strip()} stands twice", start, length, "a table has one place: put all of it there")
    if sentence == "cannot overwrite a value":
        return Slip(f"`{key[1] if key else line}` has a value already", start, length, "one of the two goes")
    if "\\" in line and (sentence.startswith("unescaped") or sentence == "invalid hex value"):
        return Slip(sentence, column, 1, r"a path is written with /, or in single quotes: 'C:\models\ink.safetensors'")
    if sentence == "invalid value":
        return Slip(sentence, column, 1, _value(line[column - 1 :]))
    if re.search(r"[0-9],[0-9]+\s*$", line[: column - 1]):
        return Slip(sentence, column, 1, NUMBERS)
    if sentence.startswith("expected '=' after a key"):
        return Slip(sentence, column, 1, "a setting is written NAME = VALUE")
    if sentence.startswith("expected newline") and re.search(r"=\s*[+-]?[0-9]*$", line[: column - 1]):
        return Slip(sentence, column, 1, NUMBERS)
    return Slip(sentence, column)


def _value(rest: str) -> str:
    """Return what to write instead of what is no value; rest: the line from there on."""
    word = re.match(r"\w*", rest)
    assert word is not None  # it may be empty
    if not rest.strip():
        return "the value is missing"
    if rest[0] in "“”„«‘’":
        return 'quotes are straight ones: "…"'
    if word[0].lower() in SWITCHES:
        return "true or false, in small letters"
    if re.match(r"\.[0-9]", rest):
        return f"0{rest.split()[0]}"
    return f'text stands in quotes: "{word[0]}"' if word[0][:1].isalpha() else ""
