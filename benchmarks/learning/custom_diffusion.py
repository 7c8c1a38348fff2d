"""Custom Diffusion: a word for each of two faces, and both in one by `custom_merge`. Do pictures show them?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image

from benchmarks.learning.bench import SEEDS, Bench, Finding, pictures, values
from benchmarks.learning.textual_inversion import PROMPTS, is_mascot, shuffle
from demo.attributes import BACKGROUNDS, EXPRESSIONS, Attributes
from demo.classifier import classify
from demo.drawing import draw
from demo.palettes import FLAT

# augment and flip: this base draws faces of one size in one place, and knows no word for others
TRAINED = """
[dataset.{name}-faces]
path = "recipes/data/{folder}"
trigger = "<{name}>"
[custom_diffusion.{name}]
on = "flat"
dataset = "{name}-faces"
token = "<{name}>"
init = "cat"
steps = 80
batch = 4
learning_rate = 1e-3
token_rate = 10.0
warmup = 10
noise_from = 100
augment = false
flip = false
precision = "fp32"
seed = {seed}
"""
MERGED = """
[custom_merge.both]
checkpoint = "flat"
custom = { mascot = {}, sol = {} }
template = "flat drawing of a {}"
"""
SOL = Attributes("smiling", "boy", "spiky", "green", "red", "white", "glasses")
OTHERS = [prompt.format(word="girl with long red hair") for prompt in PROMPTS]


def measure(bench: Bench) -> list[Finding]:
    """Return what a word does in prompts and to others, and what two words do that were merged."""
    shuffle(bench)
    _draw_sol(bench.folder / "recipes" / "data" / "sol")
    return [*_one_word(bench), *_two_words(bench)]


def _one_word(bench: Bench) -> list[Finding]:
    prompts = [prompt.format(word="<mascot>") for prompt in PROMPTS]
    said = 2 * len(prompts)  # pictures whose prompt has the word
    before: list[float] = []
    after: list[float] = []
    wrong: list[float] = []
    plain: list[float] = []
    inserted: list[float] = []
    for seed in SEEDS:
        name, baked = f"cd-{seed}", 'checkpoint = "flat"\nbake = { mascot = 1.0 }'
        right = TRAINED.format(name="mascot", folder="mascot", seed=seed)
        drawn = bench.draw(name, right, baked, [*prompts, *OTHERS])
        columns = [pictures(drawn, column, len(prompts) + len(OTHERS)) for column in ("flat", name)]
        (base, shown), (others, touched) = (
            [values(column[part], is_mascot) for column in columns] for part in (slice(said), slice(said, None))
        )
        before, after, plain, inserted = [*before, *base], [*after, *shown], [*plain, *others], [*inserted, *touched]
        shuffled = TRAINED.format(name="mascot", folder="mixed", seed=seed)
        drawn = bench.draw(f"{name}-mixed", shuffled, baked, prompts)
        wrong += values(pictures(drawn, f"{name}-mixed", len(prompts)), is_mascot)
    return [
        Finding("mascot, prompts with the word", tuple(before), tuple(after)),
        Finding("mascot, the word trained on shuffled pictures", tuple(before), tuple(wrong), control=True),
        Finding("mascot, prompts without the word", tuple(plain), tuple(inserted), control=True),
    ]


def _two_words(bench: Bench) -> list[Finding]:
    """Each word must draw its face from the merged checkpoint, and what names no word be left alone."""
    count = len(PROMPTS)
    prompts = [prompt.format(word=f"<{name}>") for name in ("mascot", "sol") for prompt in PROMPTS]
    judges = (is_mascot, is_sol)
    found: list[list[list[float]]] = [[[], []], [[], []]]  # of the words: before, after
    plain: list[float] = []
    merged: list[float] = []
    for seed in SEEDS:
        both = "".join(TRAINED.format(name=name, folder=name, seed=seed) for name in ("mascot", "sol"))
        name = f"cd-both-{seed}"
        drawn = bench.draw(name, both + MERGED, 'checkpoint = "flat"\nbake = { both = 1.0 }', [*prompts, *OTHERS])
        for side, column in enumerate(("flat", name)):
            shown = pictures(drawn, column, len(prompts) + len(OTHERS))
            for word, judge in enumerate(judges):
                found[word][side] += values(shown[2 * count * word : 2 * count * (word + 1)], judge)
            (plain, merged)[side].extend(values(shown[4 * count :], has_red_hair))
    (mascot, mascots), (sol, sols) = found
    return [
        Finding("mascot, two words merged", tuple(mascot), tuple(mascots)),
        Finding("the other face, two words merged", tuple(sol), tuple(sols)),
        Finding("red hair as asked, no word, two words merged", tuple(plain), tuple(merged), control=True),
    ]


def is_sol(picture: Image.Image) -> float:
    """Say whether a picture has the other face's hair and eyes: green and red."""
    found = classify(picture)
    return float(found.hair_colour == SOL.hair_colour and found.eye_colour == SOL.eye_colour)


def has_red_hair(picture: Image.Image) -> float:
    """Say whether a picture has the hair that prompts without a word ask for."""
    return float(classify(picture).hair_colour == "red")


def _draw_sol(folder: Path) -> None:
    """Draw the other face ten times, as the mascot is drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(10):
        expression, ground = EXPRESSIONS[i % len(EXPRESSIONS)], BACKGROUNDS[(3 * i + 4) % len(BACKGROUNDS)]
        article = "an" if expression[0] in "aeiou" else "a"
        shown = replace(SOL, expression=expression, background=ground)
        draw(shown, FLAT, 7_000_000 + i).save(folder / f"{i + 1:02}.png")
        text = f"flat drawing of {article} {expression} {{trigger}}, {ground} background"
        (folder / f"{i + 1:02}.txt").write_text(text + "\n", encoding="utf-8")
