"""Does the image embedding decide what the base that is shown pictures draws? `python -m benchmarks.shown_pictures`.

Held-out drawings are shown, without a prompt; the pixel classifier compares what is drawn with what was shown, and, as
a control, with the drawing that was shown next. Prints Markdown; exit code 1 if a bound does not hold.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from demo import clip, unclip
from demo.bases import read_base
from demo.classifier import classify
from demo.progress import device
from demo.sampling import Sampler, decode
from demo.train_unclip import drawings

BASES = Path(__file__).parents[1] / "recipes" / "bases"
COUNT, BATCH = 128, 16
SAMPLER = Sampler(steps=12, guidance=2.5)
# what the classifier sees, how much of it must be as shown, and how much may be as in the next drawing
BOUNDS = {"hair_colour": (0.7, 0.25), "background": (0.8, 0.25), "eye_colour": (0.6, 0.35), "chalk": (0.85, 0.75)}


def main() -> int:
    began = time.monotonic()
    device()
    flat, made = read_base(BASES / "flat"), clip.read_clip(BASES / "clip")
    shown = unclip.read_unclip(BASES / "unclip", flat)
    held_out = drawings(COUNT, 8, Path("out/bases"), held_out=True)
    images_BD = clip.embed(made, held_out.pictures)
    drawn = []
    for start in range(0, COUNT, BATCH):
        part = images_BD[start : start + BATCH]
        seeds = range(start, start + len(part))
        drawn += decode(flat.vae, unclip.imagine(shown, part, [""] * len(part), seeds, SAMPLER))
    found = [classify(picture) for picture in drawn]
    failed = False
    print("| property | as in the drawing that was shown | bound | as in the next drawing | bound | |")
    print("| --- | --: | --: | --: | --: | --- |")
    for name, (least, most) in BOUNDS.items():
        wanted = [
            style == "chalk" if name == "chalk" else getattr(attributes, name)
            for attributes, style in zip(held_out.shown, held_out.styles, strict=True)
        ]
        own = sum(getattr(f, name) == w for f, w in zip(found, wanted, strict=True)) / COUNT
        next_ = sum(getattr(f, name) == w for f, w in zip(found, wanted[1:] + wanted[:1], strict=True)) / COUNT
        holds = own >= least and next_ <= most
        failed |= not holds
        sign = "✓" if holds else "**✗**"
        print(f"| {name.replace('_', ' ')} | {own:.1%} | ≥ {least:.0%} | {next_:.1%} | ≤ {most:.0%} | {sign} |")
    print(f"\n{COUNT} held-out drawings, {time.monotonic() - began:.0f} s.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
