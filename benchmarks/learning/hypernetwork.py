"""Hypernetworks, linear ones baked and others beside: the style of twenty chalk drawings. Do others show it?"""

from __future__ import annotations

from benchmarks.learning.bench import SEEDS, Bench, Finding, asked, pictures, values
from benchmarks.learning.lora import FACES, shows_chalk

TRAINED = """
[hypernetwork.style]
on = "flat"
dataset = "{dataset}"
attention = "all"
activation = "{activation}"
steps = 80
batch = 4
learning_rate = 3e-3
warmup = 10
noise_from = 100
precision = "fp32"
seed = {seed}
"""
BAKED = 'checkpoint = "flat"\nbake = {{ style = {:g} }}'
BESIDE = 'checkpoint = "flat"\nsidecars = ["style"]'


def measure(bench: Bench) -> list[Finding]:
    """Return what linear layers teach and others do, and what strength 0 and drawings without chalk do.

    The note's own assertion, that a linear one does the same baked and beside, is a control: nothing may differ.
    """
    lots: dict[str, list[float]] = {"before": [], "baked": [], "beside": [], "idle": [], "swish": [], "wrong": []}
    for seed in SEEDS:
        linear = TRAINED.format(dataset="sketches", activation="linear", seed=seed)
        lots["before"] += _chalk(bench, "base", "", 'checkpoint = "flat"')
        lots["baked"] += _chalk(bench, f"linear-{seed}", linear, BAKED.format(1))
        lots["beside"] += _chalk(bench, f"linear-{seed}-beside", linear, BESIDE)
        lots["idle"] += _chalk(bench, f"linear-{seed}-off", linear, BAKED.format(0))
        lots["swish"] += _chalk(bench, f"swish-{seed}", linear.replace('"linear"', '"swish"'), BESIDE)
        other = TRAINED.format(dataset="mascot-drawings", activation="linear", seed=seed)
        lots["wrong"] += _chalk(bench, f"wrong-{seed}", other, BAKED.format(1))
    before, baked, beside, idle, swish, wrong = (tuple(lot) for lot in lots.values())
    return [
        Finding("chalk, linear layers, baked", before, baked),
        Finding("chalk, baked → beside", baked, beside, control=True),
        Finding("chalk, swish between the layers, beside", before, swish),
        Finding("chalk, linear layers at strength 0", before, idle, control=True),
        Finding("chalk, taught with drawings without it", before, wrong, control=True),
    ]


def _chalk(bench: Bench, name: str, targets: str, preset: str) -> tuple[float, ...]:
    drawn = bench.draw(name, targets, preset, [prompt for _, prompt in asked(FACES)])
    return values(pictures(drawn, name, FACES), shows_chalk)
