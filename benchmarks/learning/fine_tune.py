"""Fine-tuning on chalk drawings: whatever is asked for is drawn with chalk, also what no sketch showed."""

from __future__ import annotations

from pathlib import Path

from benchmarks.learning.bench import SEEDS, Bench, Finding, asked, pictures, values
from demo.classifier import classify

PROMPTS = [text for _, text in asked(12)]
TARGET = """
[fine_tune.chalk]
on = "flat"
dataset = "{dataset}"
seed = {seed}
steps = 90
batch = 4
learning_rate = 3e-4
schedule = "cosine"
warmup = 5
caption_dropout = 0
noise_from = 200
precision = "fp32"
"""


def measure(bench: Bench) -> list[Finding]:
    """Count chalk drawings among held-out combinations of attributes, before and after."""
    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()
    flat: tuple[float, ...] = ()
    for seed in SEEDS:
        name = f"chalk-{seed}"
        target = TARGET.format(seed=seed, dataset="sketches")
        drawn = bench.draw(name, target, 'checkpoint = "chalk"', PROMPTS)
        before += _chalk(drawn, "flat")
        after += _chalk(drawn, name)
        name = f"flatly-{seed}"
        target = TARGET.format(seed=seed, dataset="mascot-drawings")
        flat += _chalk(bench.draw(name, target, 'checkpoint = "chalk"', PROMPTS), name)
    return [
        Finding("drawn with chalk", before, after),
        Finding("the same, taught with drawings that are not", before, flat, control=True),
    ]


def _chalk(drawn: Path, column: str) -> tuple[float, ...]:
    return values(pictures(drawn, column, len(PROMPTS)), lambda picture: classify(picture).chalk)
