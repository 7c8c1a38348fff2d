"""Pictures in a terminal that can show them: kitty's protocol and iTerm2's, told by what terminals say of themselves.

Kitty: https://sw.kovidgoyal.net/kitty/graphics-protocol/, iTerm2: https://iterm2.com/documentation-images.html.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

KITTY = ("kitty", "ghostty")  # in TERM or TERM_PROGRAM
ITERM = ("iTerm.app", "WezTerm", "mintty", "vscode")  # in TERM_PROGRAM
CHUNK = 4096  # bytes of base64 that one escape of kitty's may hold
EDGE, GAP, MOST = 160, 4, 6  # pixels of a picture's height and between two; pictures in a row
ROWS = 6  # lines of text that a row of pictures is high


def protocol(stream: TextIO, environment: Mapping[str, str] = os.environ) -> str:
    """Return `kitty` or `iterm`, as the terminal behind a stream takes pictures; "" where it takes none.

    Within tmux and screen neither passes through.
    """
    if not stream.isatty() or "TMUX" in environment or environment.get("TERM", "").startswith("screen"):
        return ""
    program = environment.get("TERM_PROGRAM", "")
    told = f"{environment.get('TERM', '')} {program}"
    if "KITTY_WINDOW_ID" in environment or any(name in told for name in KITTY):
        return "kitty"
    if program in ITERM or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm"
    return ""


def escape(kind: str, png: bytes) -> str:
    """Return what a terminal is sent to show a picture, ROWS lines high, with the line's end."""
    if kind == "iterm":
        text = base64.b64encode(png).decode()
        return f"\x1b]1337;File=inline=1;size={len(png)};height={ROWS};preserveAspectRatio=1:{text}\x07\n"
    return "".join(_kitty(base64.b64encode(png).decode())) + "\n"


def _kitty(text: str) -> Iterator[str]:
    for start in range(0, len(text), CHUNK):
        head = f"a=T,f=100,q=2,r={ROWS}," if start == 0 else ""  # shown at once, a PNG, no answer wanted
        more = int(start + CHUNK < len(text))
        yield f"\x1b_G{head}m={more};{text[start : start + CHUNK]}\x1b\\"


def strip(paths: list[Path]) -> bytes:
    """Return the first pictures side by side, equally high, as PNG."""
    from PIL import Image

    small = []
    for path in paths[:MOST]:
        with Image.open(path) as picture:
            width = max(1, round(picture.width * EDGE / picture.height))
            small.append(picture.convert("RGB").resize((width, EDGE), Image.Resampling.LANCZOS))
    row = Image.new("RGB", (sum(each.width + GAP for each in small) - GAP, EDGE), "white")
    left = 0
    for each in small:
        row.paste(each, (left, 0))
        left += each.width + GAP
    buffer = io.BytesIO()
    row.save(buffer, "PNG")
    return buffer.getvalue()
