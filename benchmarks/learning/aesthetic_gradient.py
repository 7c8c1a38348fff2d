"""Aesthetic gradients: prompts that name no colour, steered towards twelve faces in violet and blue. Are pictures so?

No random number is involved in the method, so that seeds are noises that pictures are drawn from.
"""

from __future__ import annotations

import json

from PIL import Image

from benchmarks.learning.bench import Bench, Finding, pictures, values
from demo.attributes import EXPRESSIONS, PERSONS
from demo.classifier import classify

NOISES = range(1, 7)
PROMPTS = [
    f"flat drawing of {'an' if e[0] in 'aeiou' else 'a'} {e} {p}"
    for e, p in zip([*EXPRESSIONS, *EXPRESSIONS, *EXPRESSIONS], [*PERSONS] * 3, strict=False)
]
LEARNED = [  # none of them is drawn
    f"{style} of a {person} with {hair} hair"
    for style in ("flat drawing", "picture")
    for person in ("girl", "boy", "elf", "alien")
    for hair in ("short", "long")
]
COLOURS = ("blue", "purple")
TRAINED = """
[source.clip]
from = "recipes/bases/clip"
[dataset.dusk-drawings]
path = "recipes/data/dusk"
captions = "none"
[aesthetic_gradient.dusk]
on = "flat"
dataset = "dusk-drawings"
clip = "clip"
prompts = {prompts}
steps = {steps}
learning_rate = 1e-3
"""
ALONE, TOGETHER = 8, 20  # T for one prompt, and for several that share a shift (methods-embeddings §5.4)
BESIDE = 'checkpoint = "flat"\nsidecars = ["dusk"]'
BAKED = 'checkpoint = "flat"\nbake = { dusk = 1.0 }'


def measure(bench: Bench) -> list[Finding]:
    """Return what steering every prompt does, what no step does, and what a shift of all does to unseen prompts."""
    count = len(PROMPTS)
    drawn = bench.draw("ag", TRAINED.format(prompts=json.dumps(LEARNED[:1]), steps=ALONE), BESIDE, PROMPTS, NOISES)
    before = values(pictures(drawn, "ag-without", count, NOISES), is_dusk)
    after = values(pictures(drawn, "ag", count, NOISES), is_dusk)
    drawn = bench.draw("ag-0", TRAINED.format(prompts=json.dumps(LEARNED[:1]), steps=0), BESIDE, PROMPTS, NOISES)
    idle = values(pictures(drawn, "ag-0", count, NOISES), is_dusk)
    drawn = bench.draw("ag-all", TRAINED.format(prompts=json.dumps(LEARNED), steps=TOGETHER), BAKED, PROMPTS, NOISES)
    shifted = values(pictures(drawn, "ag-all", count, NOISES), is_dusk)
    return [
        Finding("hair and ground blue or purple, every prompt steered", before, after),
        Finding("the same, T = 0", before, idle, control=True),
        Finding(f"the same, {len(LEARNED)} other prompts steered together, baked", before, shifted),
    ]


def is_dusk(picture: Image.Image) -> float:
    """Say whether a picture has the colours that the twelve faces have in common."""
    found = classify(picture)
    return float(found.hair_colour in COLOURS and found.background in COLOURS)
