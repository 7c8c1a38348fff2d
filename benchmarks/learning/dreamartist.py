"""DreamArtist: a word and its opposite, learned from one drawing of the mascot. Do pictures show its hair?"""

from __future__ import annotations

import shutil

from PIL import Image

from benchmarks.learning.bench import GUIDANCE, SEEDS, Bench, Finding, pictures, values
from benchmarks.learning.textual_inversion import DATA, PROMPTS, shuffle
from demo.classifier import classify

TOKEN, OPPOSITE = "<mip>", "<mip-neg>"
TRAINED = f"""
[dreamartist.pair]
on = "flat"
dataset = "faces"
token = "{TOKEN}"
vectors = 3
negative_vectors = 6
init = "cat"
guidance = {GUIDANCE}
steps = 80
batch = 3
learning_rate = 1e-2
schedule = "cosine"
warmup = 10
noise_from = 300
min_snr = 0
precision = "fp32"
seed = {{seed}}
"""


def measure(bench: Bench) -> list[Finding]:
    """Return what both words do, what the word does alone, and what another picture teaches."""
    shuffle(bench)
    for name in ("mascot", "mixed"):
        one = bench.folder / "recipes" / "data" / f"one-{name}"
        one.mkdir(exist_ok=True)
        for path in sorted((bench.folder / "recipes" / "data" / name).glob("01.*")):
            shutil.copy(path, one / path.name)
    prompts = [prompt.format(word=TOKEN) for prompt in PROMPTS]
    preset = f'checkpoint = "flat"\ninsert = ["pair"]\nnegative_prompt = "{OPPOSITE}"'
    lots: dict[str, list[float]] = {"before": [], "both": [], "other": [], "plain": [], "inserted": []}
    for seed in SEEDS:
        right = DATA.format(folder="one-mascot", token=TOKEN) + TRAINED.format(seed=seed)
        drawn = bench.draw(f"da-{seed}", right, preset, prompts)
        lots["both"] += values(pictures(drawn, f"da-{seed}", len(prompts)), has_purple_tails)
        lots["before"] += values(pictures(drawn, "flat", len(prompts)), has_purple_tails)
        wrong = DATA.format(folder="one-mixed", token=TOKEN) + TRAINED.format(seed=seed)
        drawn = bench.draw(f"da-mixed-{seed}", wrong, preset, prompts)
        lots["other"] += values(pictures(drawn, f"da-mixed-{seed}", len(prompts)), has_purple_tails)
        others = [prompt.format(word="girl with long red hair") for prompt in PROMPTS]
        drawn = bench.draw(f"da-others-{seed}", right, preset.rpartition("\n")[0], others)
        lots["plain"] += values(pictures(drawn, "flat", len(others)), has_purple_tails)
        lots["inserted"] += values(pictures(drawn, f"da-others-{seed}", len(others)), has_purple_tails)
    before, both, other, plain, inserted = (tuple(lot) for lot in lots.values())
    return [
        Finding("purple twin tails, the word and its opposite, one picture", before, both),
        Finding("purple twin tails, the same prompts, words trained on another picture", before, other, control=True),
        Finding("purple twin tails, prompts without the words", plain, inserted, control=True),
    ]


def has_purple_tails(picture: Image.Image) -> float:
    """Say whether a picture has the mascot's hair: one picture does not tell what of it else belongs to the word."""
    found = classify(picture)
    return float(found.hair_colour == "purple" and found.twin_tails)
