"""What is to be said of a data set before anything is learned from it: by its headers and texts, not by its pixels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sdforge.artifact import Artifact
from sdforge.errors import counted
from sdforge.families import family
from sdforge.formats.tokenizer import READ
from sdforge.pictures import PICTURES

PROMPTS = ("prompt", "prompts", "negative_prompt")  # settings that hold them
NAMED, SHOWN = 3, 60  # pictures that a sentence names, letters of a prompt that it shows
ENLARGED = 2  # times, from which on a picture teaches its own blur
# with buckets or without → the ratio of edges beyond which less than half is seen; the longest bucket is 4 to 1
HALVED = {True: 8, False: 2}
PIECE = re.compile(r"[^\W\d_]+|\d|(?:_|[^\s\w])+")  # of a caption, of which CLIP's tokenizer makes one token or more

# how other programs write that words, or files, count more or less
WEIGHTED = re.compile(r"\([^()]*:\s*\d*\.?\d+\s*\)|<(?:lora|lyco|hypernet):[^<>]*>")

Said = tuple[str, str, str, bool]  # code, sentence, hint, whether it is a warning


def advise_pictures(
    name: str, dataset: Artifact, inputs: dict[str, list[Artifact | None]], table: Any, *, captions: bool
) -> Iterator[Said]:
    """Yield what cannot be learned from a data set, and what may surprise.

    name: what the recipe calls it; inputs: of the action that takes it; table: that action's settings; captions:
    whether it reads them.
    """
    yield from _unread(name, dataset.notes)
    if captions:
        yield from _captionless(name, dataset.notes)
        yield from _too_long(name, dataset.notes)
    (on,) = inputs.get("on") or [None]
    wanted = getattr(table, "resolution", None)
    if on is not None and on.family and wanted is not None:
        edge = int(wanted or family(on.family).fact(on.facts, "resolution"))
        yield from _misshapen(name, dataset.notes, edge, buckets=table.buckets)


def advise_prompts(table: Any) -> Iterator[tuple[str, Said]]:
    """Yield what is not read of a table's prompts as it may be meant, with the setting that holds them."""
    for name in PROMPTS:
        value = getattr(table, name, "")
        texts = value if isinstance(value, list) else [value]
        for prompt in (text for text in texts if isinstance(text, str)):  # checks number them
            if is_long(prompt):
                text = f"a prompt has more than the {READ} tokens that are read: {prompt[:SHOWN]!r}…"
                yield name, ("prompt", text, "what stands behind them says nothing", True)
            if found := WEIGHTED.search(prompt):
                text = f"{found[0][:SHOWN]!r} is no weight here: prompts are read as they are written"
                hint = "bake or insert what is to be drawn with" if found[0].startswith("<") else "leave it out"
                yield name, ("prompt", text, hint, True)


def is_long(text: str) -> bool:
    """Say whether a text has more tokens than are read. A piece may be several tokens: some are missed."""
    return len(PIECE.findall(text)) > READ


def _unread(name: str, notes: dict[str, Any]) -> Iterator[Said]:
    """Say which pictures are none, and which are passed over."""
    if unreadable := notes.get("unreadable", ()):
        more = f"; so it is with {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        yield "pictures", f"{name}: {unreadable[0]}{more}", "take it away, or save it anew", False
    if passed := notes.get("passed_over", ()):
        text = f"{counted(len(passed), 'picture')} in `{name}` {_are(passed)} passed over: {_some(passed)}"
        yield "pictures", text, f"what is read ends in {', '.join(PICTURES)}", True


def _captionless(name: str, notes: dict[str, Any]) -> Iterator[Said]:
    if without := notes["without"]:
        text = f"{len(without)} of {len(notes['rows'])} pictures of `{name}` have no caption: {_some(without)}"
        yield "captions", text, 'write a .txt beside each, or `caption = "…"` for all of them', True


def _too_long(name: str, notes: dict[str, Any]) -> Iterator[Said]:
    """Say which captions are longer than what a text encoder reads."""
    found = _names({row[0] for row in notes["rows"] if is_long(row[1])}, notes)
    if found:
        text = f"the captions of {counted(len(found), 'picture')} of `{name}` have more than the {READ} tokens"
        yield "captions", f"{text} that are read: {_some(found)}", "what stands behind them teaches nothing", True


def _misshapen(name: str, notes: dict[str, Any], edge: int, *, buckets: bool) -> Iterator[Said]:
    """Say which pictures are much smaller than what is trained (edge² pixels), and of which most is cut off."""
    sizes = notes.get("sizes", {})
    small = {sha256 for sha256, (w, h) in sizes.items() if w * h * ENLARGED**2 < edge**2}
    if found := _names(small, notes):
        text = f"{counted(len(found), 'picture')} of `{name}` {_are(found)} enlarged more than {ENLARGED} times"
        text += f", to {edge} × {edge} pixels: {_some(found)}"
        yield "pictures", text, "larger ones, or a smaller resolution", True
    long = {sha256 for sha256, size in sizes.items() if max(size) > HALVED[buckets] * min(size)}
    if found := _names(long, notes):
        text = f"less than half is seen of {counted(len(found), 'picture')} of `{name}`: {_some(found)}"
        hint = "cut out what matters" if buckets else "buckets = true keeps shapes up to 4 to 1"
        yield "pictures", text, hint, True


def _names(pictures: Iterable[str], notes: dict[str, Any]) -> list[str]:
    """Return what pictures (by their sha256) are called, where they have files."""
    return sorted(notes["names"][sha256][0] for sha256 in pictures if sha256 in notes["names"])


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:NAMED], *(["…"] * (len(names) > NAMED))])


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
