"""Durations, sizes and glyphs as people read them."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import TextIO

from sdforge.hidden import hidden

GLYPHS = {"reuse": "✓", "build": "●", "maybe": "○", "fetch": "↓", "unneeded": "·", "failed": "✗", "warning": "▲"}
ASCII = {"reuse": "ok", "build": "*", "maybe": "?", "fetch": "get", "unneeded": "-", "failed": "FAIL", "warning": "!"}
INSET = 6  # letters before what is said of a line above


def glyphs(stream: TextIO | None = None) -> dict[str, str]:
    """Return the signs for states, in letters that the stream can carry."""
    encoding = getattr(stream or sys.stdout, "encoding", None) or "ascii"
    try:
        "".join(GLYPHS.values()).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return GLYPHS


def safe(text: str, stream: TextIO) -> str:
    """Return text in letters that a stream can carry, without secrets and control characters that a file brought."""
    text = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in hidden(text))
    encoding = getattr(stream, "encoding", None) or "ascii"
    table = {"→": "->", "×": "x", "–": "-", "…": "...", "·": "-", "✓": "ok", "●": "*", "○": "?"}
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        for sign, plain in table.items():
            text = text.replace(sign, plain)
        text = text.encode(encoding, "replace").decode(encoding)
    return text


def screen_width(stream: TextIO) -> int:
    """Return how many letters a line of a terminal holds; 0 for what is no terminal, where lines end nowhere."""
    return shutil.get_terminal_size().columns if stream.isatty() else 0


def hung(head: str, text: str, width: int) -> str:
    """Return head and text on one line, or the text on lines of its own where a line holds `width` letters."""
    line = f"{head} {text}".rstrip()
    if not width or len(line) <= width or not text:
        return line
    inset = " " * INSET
    broken = textwrap.wrap(
        text, width, initial_indent=inset, subsequent_indent=inset, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join([head.rstrip(), *broken])


def say(text: str) -> None:
    """Print a line to a person."""
    print(safe(text, sys.stdout))


def seconds(value: float) -> str:
    """Return a duration: 0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if value < 10:
        return f"{value:.1f} s"
    if value < 60:
        return f"{value:.0f} s"
    minutes, rest = divmod(int(value + 0.5), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def size(value: float) -> str:
    """Return bytes in decimal units: 812 B, 4.1 MB, 2.1 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return ""
