"""Slips of the pen in TOML: what the reader says of them, in words that tell the way out."""

from __future__ import annotations

import re
from typing import NamedTuple

NUMBERS = "numbers are written 5, 0.5 or 1e-4"
# of what has no end, as tomli says it: the quote that is missing, or the way out
TEXTS = {
    "illegal character '\\n'": '"',
    "unterminated string": '"',
    "found invalid character '\\n'": "'",
    """expected "'\"""": "'",
    """expected "'''\"""": "'",
}
CLOSED = {"unclosed array": "a comma or ] is missing", "unclosed inline table": "a comma or } is missing"}
ENDLESS = (*TEXTS, *CLOSED)
KEYS = "a name has letters, digits, - and _, and no spaces; any other key stands in quotes"
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
    if sentence in TEXTS:
        return _unclosed(TEXTS[sentence], line, column)
    if sentence in CLOSED:
        return Slip(sentence, column, 1, CLOSED[sentence])
    if sentence.startswith("expected ']' at the end"):
        return Slip(sentence, column, 1, KEYS if line[column - 1 :].strip() else "a ] is missing")
    if sentence.startswith("invalid initial character"):
        return Slip(sentence, column, 1, KEYS)
    if sentence == "invalid statement" and line.lstrip().startswith(("//", ";", "--")):
        return Slip(sentence, column, 1, "a comment begins with #")
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
    if sentence.startswith("expected newline") and "=" in line[column - 1 :]:
        return Slip(sentence, column, 1, "each setting has a line of its own")
    return Slip(sentence, column)


def _unclosed(quote: str, line: str, column: int) -> Slip:
    """Return what is said of a text that ends nowhere: it begins at the last quote of its line."""
    end = line.rfind(quote) + 1 or column
    begins = len(line[:end].rstrip(quote)) + 1  # there may be three
    return Slip(
        "a text is not closed", begins, len(line) - begins + 1, f"{line[begins - 1 : end]} is missing at its end"
    )


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
