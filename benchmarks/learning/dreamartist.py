"""DreamArtist: a word and its opposite, learned from one drawing of the mascot. How much of it do pictures show?"""

from __future__ import annotations

import shutil

from benchmarks.learning.bench import GUIDANCE, SEEDS, Bench, Finding, pictures, values
from benchmarks.learning.textual_inversion import DATA, PROMPTS, likeness, shuffle

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
steps = 60
batch = 2
learning_rate = 1e-2
schedule = "cosine"
warmup = 10
noise_from = 100
precision = "fp32"
seed = {{seed}}
"""


def measure(bench: Bench) -> list[Finding]:
    """Return what both words do, what the word does alone, and what another picture teaches."""
    shuffle(bench)
    for name in ("mascot", "mixed"):
        one = bench.folder / "recipes" / "data" / f"one-{name}"
        one.mkdir(exist_ok=True)
        for path in sorted((bench.folder / "recipes" / "data" / name).glob("06.*")):
            shutil.copy(path, one / path.name)
    prompts = [prompt.format(word=TOKEN) for prompt in PROMPTS]
    preset = f'checkpoint = "flat"\ninsert = ["pair"]\nnegative_prompt = "{OPPOSITE}"'
    lots: dict[str, list[float]] = {"before": [], "both": [], "other": [], "plain": [], "inserted": []}
    for seed in SEEDS:
        right = DATA.format(folder="one-mascot", token=TOKEN) + TRAINED.format(seed=seed)
        drawn = bench.draw(f"da-{seed}", right, preset, prompts)
        lots["both"] += values(pictures(drawn, f"da-{seed}", len(prompts)), likeness)
        lots["before"] += values(pictures(drawn, "flat", len(prompts)), likeness)
        wrong = DATA.format(folder="one-mixed", token=TOKEN) + TRAINED.format(seed=seed)
        drawn = bench.draw(f"da-mixed-{seed}", wrong, preset, prompts)
        lots["other"] += values(pictures(drawn, f"da-mixed-{seed}", len(prompts)), likeness)
        others = [prompt.format(word="girl with long red hair") for prompt in PROMPTS[:4]]
        drawn = bench.draw(f"da-others-{seed}", right, preset.rpartition("\n")[0], others)
        lots["plain"] += values(pictures(drawn, "flat", len(others)), likeness)
        lots["inserted"] += values(pictures(drawn, f"da-others-{seed}", len(others)), likeness)
    before, both, other, plain, inserted = (tuple(lot) for lot in lots.values())
    return [
        Finding("mascot, the word and its opposite, one picture", before, both),
        Finding("mascot, the same prompts, words trained on another picture", before, other, control=True),
        Finding("mascot, prompts without the words", plain, inserted, control=True),
    ]
