"""DreamBooth on the mascot: its word draws it, and with class images its class stays what it was."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from benchmarks.learning.bench import SEEDS, Bench, Finding, pictures, values
from demo.attributes import BACKGROUNDS
from demo.classifier import classify
from demo.make_data import MASCOT

CLASS = "flat drawing of a girl"
SUBJECT = "flat drawing of a sks girl"
PLACES = ["", *(f", {ground} background" for ground in BACKGROUNDS), " wearing glasses", " wearing a hat"]
KEPT = 0.5  # of plain fine-tuning's forgetting at most, which the method promises
LEARNED = 1.5  # times plain fine-tuning's loss on held-out drawings at most
SKIN = "green"  # of aliens

PEOPLE = """
[class_images.people]
on = "flat"
prompts = ["flat drawing of a girl", "flat drawing of a boy"]
count = 24
steps = 12
guidance = 2.5
precision = "fp32"
"""
TARGET = """
[dataset.mip-drawings]
path = "recipes/data/mascot"
trigger = "mip"
validation = 2

[dreambooth.mip]
on = "flat"
dataset = "mip-drawings"
prompt = "flat drawing of a sks girl"
seed = {seed}
steps = 60
batch = 4
text_encoder = true
text_learning_rate = 5e-4
learning_rate = 4e-4
schedule = "cosine"
warmup = 5
noise_from = 100
precision = "fp32"
"""


def measure(bench: Bench) -> list[Finding]:
    """Count the mascot's traits where its word is said and where it is not, with class images and without."""
    subject, girls = ([text + place for place in PLACES] for text in (SUBJECT, CLASS))
    base_word: tuple[float, ...] = ()
    kept_word: tuple[float, ...] = ()
    base_class: tuple[float, ...] = ()
    kept_class: tuple[float, ...] = ()
    plain_class: tuple[float, ...] = ()
    losses = {"kept": 0.0, "plain": 0.0}
    for seed in SEEDS:
        target = TARGET.format(seed=seed)
        kept = bench.draw(f"kept-{seed}", f'{PEOPLE}{target}prior = "people"', 'checkpoint = "mip"', subject + girls)
        plain = bench.draw(f"plain-{seed}", target, 'checkpoint = "mip"', girls)
        both = _traits(kept, "flat", len(subject + girls)), _traits(kept, f"kept-{seed}", len(subject + girls))
        half = len(both[0]) // 2
        base_word, kept_word = base_word + both[0][:half], kept_word + both[1][:half]
        base_class, kept_class = base_class + both[0][half:], kept_class + both[1][half:]
        plain_class += _traits(plain, f"plain-{seed}", len(girls))
        for name in losses:
            losses[name] += bench.record(f"{name}-{seed}:mip")["validation"][-1][1] / len(SEEDS)
    forgot = [sum(b - a for a, b in zip(base_class, lot, strict=True)) for lot in (kept_class, plain_class)]
    ratio, share = losses["kept"] / losses["plain"], forgot[0] / forgot[1]
    held_out = f"held-out loss {ratio:.2f} × that without class images, at most {LEARNED}"
    forgetting = f"{share:.2f} of the forgetting, at most {KEPT}"
    return [
        Finding("the mascot's traits, its word is said", base_word, kept_word, bound=held_out, kept=ratio <= LEARNED),
        Finding("its word is not said, no class images", base_class, plain_class),
        Finding(
            "its word is not said: without → with class images",
            plain_class,
            kept_class,
            bound=forgetting,
            kept=share <= KEPT,
        ),
    ]


def _traits(drawn: Path, column: str, prompts: int) -> tuple[float, ...]:
    return values(pictures(drawn, column, prompts), traits)


def traits(picture: Image.Image) -> float:
    """Return the share of the mascot's traits that a picture shows: skin, hair colour, twin tails."""
    found = classify(picture)
    return (int(found.skin == SKIN) + int(found.hair_colour == MASCOT.hair_colour) + int(found.twin_tails)) / 3
