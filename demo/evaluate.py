"""What was asked for against what the pixel classifier finds: held-out prompts, shares and tables. No torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from demo.attributes import BACKGROUNDS, EYE_COLOURS, HAIR_COLOURS, Attributes, caption, draw_combinations
from demo.classifier import Found, classify

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

PROMPT_SEED = 64  # of the held-out combinations
MEASURED = {"hair_colour": HAIR_COLOURS, "background": BACKGROUNDS, "eye_colour": EYE_COLOURS}
NOTHING = "none"  # where the classifier found no open eye


@dataclass(frozen=True)
class Judged:
    """One picture: what was asked for and what the classifier found."""

    asked: Attributes
    found: Found


def held_out_prompts(style: str, count: int) -> list[tuple[Attributes, str]]:
    """Return combinations kept out of training, and captions, every second one without "... drawing of"."""
    chosen = islice(draw_combinations(PROMPT_SEED, held_out=True), count)
    return [(a, caption(a, style if index % 2 == 0 else None)) for index, a in enumerate(chosen)]


def judge(asked: Sequence[Attributes], pictures: Sequence[Image.Image]) -> list[Judged]:
    """Let the classifier look at each picture."""
    return [Judged(a, classify(picture)) for a, picture in zip(asked, pictures, strict=True)]


def shares(judged: Sequence[Judged]) -> dict[str, float]:
    """Return the share of pictures, 0..1, in which each measured attribute is as asked."""
    return {
        name: sum(getattr(one.asked, name) == getattr(one.found, name) for one in judged) / len(judged)
        for name in MEASURED
    }


def report(judged: Sequence[Judged]) -> str:
    """Return the shares on one line."""
    return "  ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in shares(judged).items())


def confusion(judged: Sequence[Judged], name: str) -> str:
    """Return a Markdown table: a row for each value asked, a column for each value found."""
    values = MEASURED[name]
    counts = Counter((getattr(one.asked, name), getattr(one.found, name) or NOTHING) for one in judged)
    columns = [*values, *([NOTHING] if any(found == NOTHING for _, found in counts) else [])]
    lines = [[f"{name.replace('_', ' ')}: asked ↓ found →", *columns], ["---", *(["--:"] * len(columns))]]
    lines += [[asked, *(str(counts[asked, found] or "·") for found in columns)] for asked in values]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
