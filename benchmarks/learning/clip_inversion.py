"""CLIP inversion: an image embedding of three drawings of the mascot. Do pictures without a prompt show the mascot?"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from benchmarks.learning.bench import SEEDS, Bench, Finding, pictures, values
from demo.classifier import classify
from demo.drawing import draw
from demo.make_data import PORTRAIT
from demo.palettes import FLAT

PROMPTS = [""]
NOISES = range(1, 25)
TRAINED = """
[source.unclip]
from = "recipes/bases/unclip"
[dataset.faces]
path = "recipes/data/{folder}"
captions = "none"
[clip_inversion.look]
on = "unclip"
dataset = "faces"
steps = 60
batch = 4
learning_rate = 3e-2
schedule = "cosine"
warmup = 5
noise_from = 200
precision = "fp32"
seed = {seed}
"""
SHOWN = 'checkpoint = "unclip"\nsidecars = ["look"]'
BAKED = 'checkpoint = "unclip"\nbake = { look = 1.0 }'


def measure(bench: Bench) -> list[Finding]:
    """Return what the embedding shows, what another face's shows, and whether it shows the same from the weights."""
    _other_face(bench.folder / "recipes" / "data" / "three-others")
    before: list[float] = []
    after: list[float] = []
    other: list[float] = []
    baked: list[float] = []
    for seed in SEEDS:
        right = TRAINED.format(folder="three-mascots", seed=seed)
        name = f"ci-{seed}"
        drawn = bench.draw(name, right, SHOWN, PROMPTS, NOISES, family="unclip")
        before += values(pictures(drawn, f"{name}-without", 1, NOISES), is_mascot)
        after += values(pictures(drawn, name, 1, NOISES), is_mascot)
        wrong = TRAINED.format(folder="three-others", seed=seed)
        name = f"ci-other-{seed}"
        drawn = bench.draw(name, wrong, SHOWN, PROMPTS, NOISES, family="unclip")
        other += values(pictures(drawn, name, 1, NOISES), is_mascot)
        # both sides of guidance draw from what is baked: it shows, though nothing guides towards it
        name = f"ci-baked-{seed}"
        drawn = bench.draw(name, right, BAKED, PROMPTS, NOISES, family="unclip")
        baked += values(pictures(drawn, name, 1, NOISES), is_mascot)
    return [
        Finding("purple hair and green skin, no prompt, the embedding shown", tuple(before), tuple(after)),
        Finding("the same, another face's embedding shown", tuple(before), tuple(other), control=True),
        Finding("the same, the embedding baked", tuple(before), tuple(baked)),
    ]


def is_mascot(picture: Image.Image) -> float:
    """Say whether a picture has the mascot's colours, which the three drawings have in common with few others."""
    found = classify(picture)
    return float(found.hair_colour == "purple" and found.skin == "green")


def _other_face(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(3):
        draw(PORTRAIT, FLAT, 8_000_000 + i).save(folder / f"{i + 1:02}.png")
