"""What the demo draws, measured: `python -m benchmarks.demo_pictures`, from the repository's root.

Copies the project, adds recipes whose previews are the prompts that are measured, builds them with the real `forge
build`, lets the pixel classifier look at every picture, and prints Markdown. Exit code 1 if a bound does not hold.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from demo.attributes import BACKGROUNDS, EXPRESSIONS, draw_combinations
from demo.classifier import Found, classify
from demo.drawing import draw
from demo.evaluate import MEASURED, Judged, confusion, held_out_prompts, judge, shares
from demo.make_data import MASCOT
from demo.palettes import LOOKS

ROOT = Path(__file__).parents[1]
PRESET = "anime-preset"
SEEDS = (1, 2)
PROMPTS = 64
FEW = 16  # prompts for embedding and LoRA: with two seeds 32 pictures
DRAWINGS = 500  # of each style, for the classifier itself
DRAWING_SEED, FIRST_DRAWING = 99, 5_000_000

# hair colour, background, eye colour
BASE_BOUNDS = {"hair_colour": 0.97, "background": 0.97, "eye_colour": 0.65}
MERGE_BOUNDS = {"hair_colour": 0.95, "background": 0.95, "eye_colour": 0.55}


@dataclass(frozen=True)
class Verdict:
    """A number and the bound that it must keep. Counts have `of`; shares have 1."""

    what: str
    found: float
    bound: float
    of: int = 1
    at_most: bool = False

    @property
    def holds(self) -> bool:
        return self.found <= self.bound if self.at_most else self.found >= self.bound

    def row(self) -> str:
        def shown(value: float) -> str:
            return f"{value:.0f} of {self.of}" if self.of > 1 else f"{value:.1%}"

        sign = "≤" if self.at_most else "≥"
        return f"| {self.what} | {shown(self.found)} | {sign} {shown(self.bound)} | {'✓' if self.holds else '**✗**'} |"


# -- the project that is measured --------------------------------------------------------------------------------------


def copy_project(folder: Path) -> dict[str, Any]:
    """Copy what git has of the project, with recipes for measuring beside its own; return the preset's recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("forge.toml", "forge.lock"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "recipes", folder / "recipes", dirs_exist_ok=True)
    recipe = tomllib.loads((folder / "recipes" / f"{PRESET}.toml").read_text())
    for name, text in measuring_recipes(recipe).items():
        (folder / "recipes" / f"{name}.toml").write_text(text)
    return recipe


def measuring_recipes(recipe: dict[str, Any]) -> dict[str, str]:
    """Name → text of the recipes whose previews are measured."""
    asked = {style: [text for _, text in held_out_prompts(style, PROMPTS)] for style in ("flat", "ink")}
    merged = 'family = "sd15"\n[weighted_sum.half]\ncheckpoints = ["flat", "ink"]\nweights = [0.5, 0.5]\n'
    word = recipe["textual_inversion"]["mascot"]["token"]
    soft, inserted = f"{PRESET}:soft", f"{PRESET}:preset.insert"
    bake = "{ " + ", ".join(f'"{PRESET}:{name}" = {s}' for name, s in recipe["preset"]["bake"].items()) + " }"
    drawn = recipe["preset"]["previews"]
    known = [*mascot_prompts(word), *mascot_prompts("girl")]
    styled = [*asked["flat"][:FEW], *mascot_prompts(word)]
    return {
        "measure-merges": merged,
        "measure-flat": _preset("flat", "", asked["flat"], drawn),
        "measure-ink": _preset("ink", "", asked["ink"], drawn),
        "measure-half": _preset("measure-merges:half", "", asked["flat"], drawn),
        "measure-soft": _preset(soft, "", asked["flat"], drawn),
        "measure-mascot": _preset(soft, f'insert = ["{PRESET}:mascot"]\n', known, drawn),
        "measure-style": _preset(inserted, f'bake = {bake}\ndtype = "fp16"\n', styled, drawn),
    }


def _preset(checkpoint: str, more: str, prompts: Sequence[str], drawn: dict[str, Any]) -> str:
    return (
        f'family = "sd15"\n[preset]\ncheckpoint = "{checkpoint}"\n{more}export = []\n'
        f"[preset.previews]\nprompts = {json.dumps(prompts)}\nseeds = {json.dumps(SEEDS)}\n"
        f"steps = {drawn['steps']}\nguidance = {drawn['guidance']}\n"
    )


def mascot_prompts(word: str) -> list[str]:
    """Return prompts that name the mascot, an expression and a background, and nothing of how it looks."""
    wishes = [(EXPRESSIONS[i % len(EXPRESSIONS)], BACKGROUNDS[i % len(BACKGROUNDS)]) for i in range(FEW)]
    articles = ["an" if expression[0] in "aeiou" else "a" for expression, _ in wishes]
    return [f"flat drawing of {a} {e} {word}, {b} background" for a, (e, b) in zip(articles, wishes, strict=True)]


def pictures(folder: Path, name: str, column: str, prompts: range) -> list[Image.Image]:
    """Return the previews of some prompts, every seed of a prompt after the other."""
    found = folder / "out" / name / "previews"
    return [Image.open(found / f"{p + 1}-{seed}-{column}.png") for p in prompts for seed in SEEDS]


# -- what is measured --------------------------------------------------------------------------------------------------


def measure_classifier() -> tuple[list[Verdict], list[str]]:
    """The classifier on drawings of our own that nobody learned from, and on the same with exchanged prompts."""
    verdicts = []
    for style, look in LOOKS.items():
        asked = list(islice(draw_combinations(DRAWING_SEED, held_out=True), DRAWINGS))
        judged = judge(asked, [draw(a, look, FIRST_DRAWING + i) for i, a in enumerate(asked)])
        exchanged = [one.found for one in judged]
        random.Random(0).shuffle(exchanged)
        by_chance = shares([Judged(one.asked, found) for one, found in zip(judged, exchanged, strict=True)])
        for name, share in shares(judged).items():
            words = name.replace("_", " ")
            verdicts.append(Verdict(f"{style} drawings: {words}", share, 0.99))
            chance = 1 / len(MEASURED[name]) + 0.05
            verdicts.append(Verdict(f"{style} drawings, prompts exchanged: {words}", by_chance[name], chance, 1, True))
    return verdicts, []


def measure_bases(folder: Path) -> tuple[list[Verdict], list[str]]:
    """Both bases and two merges of them, on prompts for combinations that were kept out of training.

    A table of confusion stands once, under the names of all whose pictures gave it.
    """
    verdicts: list[Verdict] = []
    tables: dict[str, list[str]] = {}
    for name in ("flat", "ink", "half", "soft"):
        asked = [a for a, _ in held_out_prompts("flat", PROMPTS) for _ in SEEDS]
        judged = judge(asked, pictures(folder, f"measure-{name}", f"measure-{name}", range(PROMPTS)))
        bounds = BASE_BOUNDS if name in ("flat", "ink") else MERGE_BOUNDS
        for attribute, share in shares(judged).items():
            verdicts.append(Verdict(f"{name}: {attribute.replace('_', ' ')}", share, bounds[attribute]))
            tables.setdefault(confusion(judged, attribute), []).append(name)
    return verdicts, [f"**{', '.join(names)}**\n\n{table}" for table, names in tables.items()]


def measure_mascot(folder: Path) -> tuple[list[Verdict], list[str]]:
    """The mascot's two rarest attributes, found together: purple hair (1 in 8) in twin tails (1 in 6)."""
    with_word = pictures(folder, "measure-mascot", "measure-mascot", range(FEW))
    as_letters = pictures(folder, "measure-mascot", f"{PRESET}.soft", range(FEW))
    girl = pictures(folder, "measure-mascot", f"{PRESET}.soft", range(FEW, 2 * FEW))
    seen = [classify(picture) for picture in with_word]
    wanted = [BACKGROUNDS[i % len(BACKGROUNDS)] for i in range(FEW) for _ in SEEDS]
    obeyed = sum(found.background == wish for found, wish in zip(seen, wanted, strict=True))
    count = len(seen)
    verdicts = [
        Verdict("mascot, with the embedding: purple twin tails", sum(map(is_mascot, seen)), 24, count),
        Verdict("… the same prompts without it", _mascots(as_letters), 6, count, True),
        Verdict("… the same prompts with the word girl", _mascots(girl), 6, count, True),
    ]
    others = (
        f"Also with the embedding, of {count}: green skin {sum(f.skin == 'green' for f in seen)}, "
        f"red eyes {sum(f.eye_colour == MASCOT.eye_colour for f in seen)}, the prompt's background {obeyed}."
    )
    return verdicts, [others]


def is_mascot(found: Found) -> bool:
    return found.hair_colour == MASCOT.hair_colour and found.twin_tails


def _mascots(drawn: list[Image.Image]) -> int:
    return sum(is_mascot(classify(picture)) for picture in drawn)


def measure_style(folder: Path) -> tuple[list[Verdict], list[str]]:
    """Chalk: a ground of its dark palette and chalk-white outlines.

    The background is right if the corners' colour is nearest, of all grounds of all three palettes, to one of the
    name that the prompt gives: with chalk that is the dark tone in which the data set draws "pink background".
    """
    asked = [a for a, _ in held_out_prompts("flat", FEW) for _ in SEEDS]
    with_lora = [classify(p) for p in pictures(folder, "measure-style", "measure-style", range(FEW))]
    without = [classify(p) for p in pictures(folder, "measure-style", f"{PRESET}.preset.insert", range(FEW))]
    both = [classify(p) for p in pictures(folder, "measure-style", "measure-style", range(FEW, 2 * FEW))]
    right = sum(a.background == found.background for a, found in zip(asked, with_lora, strict=True))
    hair = sum(a.hair_colour == found.hair_colour for a, found in zip(asked, with_lora, strict=True))
    count = len(asked)
    verdicts = [
        Verdict("chalk, with the LoRA baked as the recipe says", sum(f.chalk for f in with_lora), 28, count),
        Verdict("… at strength 0", sum(f.chalk for f in without), 4, count, True),
        Verdict("… the prompt's background, with the LoRA", right, 0.75 * count, count),
    ]
    others = (
        f"Also with the LoRA, of {count}: the prompt's hair colour {hair}. The mascot in chalk, of {count}: "
        f"purple twin tails {sum(map(is_mascot, both))}, chalk {sum(f.chalk for f in both)}."
    )
    return verdicts, [others]


# -- all of it ---------------------------------------------------------------------------------------------------------


def build(folder: Path, names: Sequence[str]) -> None:
    """Run the real command; what it says goes to stderr."""
    command = [str(Path(sys.executable).with_name("forge")), "build", *names, "--plain"]
    subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)


def measure(folder: Path) -> int:
    """Build, look, print; return the exit code."""
    recipe = copy_project(folder)
    build(folder, [name for name in measuring_recipes(recipe) if name != "measure-merges"])
    parts = (measure_classifier(), measure_bases(folder), measure_mascot(folder), measure_style(folder))
    verdicts = [verdict for found, _ in parts for verdict in found]
    print("| what | found | bound | |\n| --- | --: | --: | --- |")
    print("\n".join(verdict.row() for verdict in verdicts))
    for _, notes in parts:
        for note in notes:
            print(f"\n{note}")
    return 0 if all(verdict.holds for verdict in verdicts) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what the demo draws.")
    parser.add_argument("--work", type=Path, help="a folder to build in and to keep; default: a temporary one")
    arguments = parser.parse_args()
    if arguments.work:
        return measure(arguments.work)
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder))


if __name__ == "__main__":
    sys.exit(main())
