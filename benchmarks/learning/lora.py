"""LoRA and its variants: the style of twenty chalk drawings. Do pictures of other faces show it?"""

from __future__ import annotations

from PIL import Image

from benchmarks.learning.bench import SEEDS, Bench, Finding, asked, pictures, values
from demo.classifier import classify

FACES = 11  # held-out ones, each drawn from two noises
TRAINED = """
[{method}.style]
on = "flat"
dataset = "sketches"
steps = 60
batch = 4
warmup = 10
caption_dropout = 0
noise_from = 100
precision = "fp32"
seed = {seed}
{settings}
"""
VARIANTS = {
    "lora": "rank = 8\nlearning_rate = 8e-3",
    "rslora": "rank = 8\nalpha = 3\nlearning_rate = 8e-3\nrslora = true",
    "dora": "rank = 8\nlearning_rate = 8e-3\ndora = true",
}


def measure(bench: Bench) -> list[Finding]:
    """Return how many pictures show the style, by variant; at strength 0 none may show more of it than before."""
    taught = [teach(bench, "lora", name, settings) for name, settings in VARIANTS.items()]
    return [*taught, teach(bench, "lora", "lora", VARIANTS["lora"], strength=0.0)]


def teach(bench: Bench, method: str, name: str, settings: str, *, strength: float = 1.0) -> Finding:
    """Train on the drawings with every seed; judge what the base draws, and what it draws with the style baked in."""
    prompts = [prompt for _, prompt in asked(FACES)]
    before: list[float] = []
    after: list[float] = []
    for seed in SEEDS:
        targets = TRAINED.format(method=method, seed=seed, settings=settings)
        base = bench.draw("base", "", 'checkpoint = "flat"', prompts)
        before += values(pictures(base, "base", FACES), shows_chalk)
        called = f"{name}-{seed}" if strength else f"{name}-{seed}-off"
        drawn = bench.draw(called, targets, f'checkpoint = "flat"\nbake = {{ style = {strength} }}', prompts)
        after += values(pictures(drawn, called, FACES), shows_chalk)
    return Finding(f"chalk, {name} at strength {strength:g}", tuple(before), tuple(after), control=not strength)


def shows_chalk(picture: Image.Image) -> float:
    """Say whether a picture has the style's ground and its outlines."""
    return float(classify(picture).chalk)
