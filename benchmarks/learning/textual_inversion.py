"""Textual inversion: a word for the mascot, learned from ten drawings. Do pictures show the mascot?"""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image

from benchmarks.learning.bench import SEEDS, Bench, Finding, pictures, values
from demo.attributes import BACKGROUNDS, EXPRESSIONS
from demo.classifier import classify

TOKEN = "<mascot>"
PROMPTS = [
    f"flat drawing of {'an' if e[0] in 'aeiou' else 'a'} {e} {{word}}, {b} background"
    for e, b in zip([*EXPRESSIONS, *EXPRESSIONS], BACKGROUNDS * 2, strict=False)
] + ["flat drawing of a smiling {word} wearing glasses, blue background"]
DATA = '[dataset.faces]\npath = "recipes/data/{folder}"\ntrigger = "{token}"\n'
TRAINED = """
[textual_inversion.word]
on = "flat"
dataset = "faces"
token = "<mascot>"
vectors = 3
init = "cat"
steps = 80
batch = 4
learning_rate = 1e-2
schedule = "cosine"
warmup = 20
noise_from = 100
precision = "fp32"
seed = {seed}
"""


def measure(bench: Bench) -> list[Finding]:
    """Return what the word does in prompts, what its being there does to others, and what wrong pictures teach."""
    shuffle(bench)
    prompts = [prompt.format(word=TOKEN) for prompt in PROMPTS]
    others = [prompt.format(word="girl with long red hair") for prompt in PROMPTS]
    before: list[float] = []
    after: list[float] = []
    wrong: list[float] = []
    without: list[tuple[float, ...]] = []
    for seed in SEEDS:
        preset = 'checkpoint = "flat"\ninsert = ["word"]'
        right = DATA.format(folder="mascot", token=TOKEN) + TRAINED.format(seed=seed)
        drawn = bench.draw(f"ti-{seed}", right, preset, prompts)
        after += values(pictures(drawn, f"ti-{seed}", len(prompts)), is_mascot)
        before += values(pictures(drawn, "flat", len(prompts)), is_mascot)
        shuffled = DATA.format(folder="mixed", token=TOKEN) + TRAINED.format(seed=seed)
        drawn = bench.draw(f"ti-mixed-{seed}", shuffled, preset, prompts)
        wrong += values(pictures(drawn, f"ti-mixed-{seed}", len(prompts)), is_mascot)
        drawn = bench.draw(f"ti-others-{seed}", right, preset, others)
        without += [values(pictures(drawn, column, len(others)), is_mascot) for column in ("flat", f"ti-others-{seed}")]
    plain, inserted = (tuple(v for each in without[i::2] for v in each) for i in (0, 1))
    return [
        Finding("mascot, prompts with the word", tuple(before), tuple(after)),
        Finding(
            "mascot, the same prompts, word trained on shuffled pictures", tuple(before), tuple(wrong), control=True
        ),
        Finding("mascot, prompts without the word", plain, inserted, control=True),
    ]


def is_mascot(picture: Image.Image) -> float:
    """Say whether a picture has all three marks of the mascot: purple hair, twin tails, green skin."""
    found = classify(picture)
    return float(found.hair_colour == "purple" and found.twin_tails and found.skin == "green")


def shuffle(bench: Bench) -> None:
    """Put other faces beside the mascot's captions: the drawings of the demo's held-out combinations."""
    from itertools import islice

    from demo.attributes import draw_combinations
    from demo.drawing import draw
    from demo.palettes import FLAT

    folder = bench.folder / "recipes" / "data" / "mixed"
    folder.mkdir(parents=True, exist_ok=True)
    captions = sorted((bench.folder / "recipes" / "data" / "mascot").glob("*.txt"))
    for i, (path, face) in enumerate(zip(captions, islice(draw_combinations(9, held_out=True), 10), strict=True)):
        shutil.copy(path, folder / path.name)
        draw(face, FLAT, 6_000_000 + i).save(folder / Path(path.name).with_suffix(".png"))
