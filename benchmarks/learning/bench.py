"""A project to measure in, pictures drawn in it, and the statistics of what they show."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from demo.attributes import Attributes
from demo.evaluate import held_out_prompts

ROOT = Path(__file__).parents[2]
SEEDS = (0, 1, 2)  # of trainings
DRAWS = 2000  # of the bootstrap
STEPS, GUIDANCE = 12, 2.5  # of the sampler


@dataclass
class Bench:
    """A copy of the project, in which recipes are written and built; what was built before is reused."""

    folder: Path
    recipes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "forge.toml", self.folder / "forge.toml")
        shutil.copytree(ROOT / "recipes", self.folder / "recipes", dirs_exist_ok=True)

    def build(self, name: str, recipe: str) -> Path:
        """Build a recipe of this text; return its folder in `out/`."""
        (self.folder / "recipes" / f"{name}.toml").write_text(recipe, encoding="utf-8")
        command = [str(Path(sys.executable).with_name("forge")), "build", name, "--plain"]
        subprocess.run(command, cwd=self.folder, check=True, stdout=sys.stderr)
        return self.folder / "out" / name

    def record(self, target: str) -> dict[str, Any]:
        """Return what was recorded when a target (RECIPE:NAME) was made."""
        command = [str(Path(sys.executable).with_name("forge")), "show", target, "--json"]
        done = subprocess.run(command, cwd=self.folder, check=True, capture_output=True, text=True)
        record: dict[str, Any] = json.loads(done.stdout)["record"]
        return record

    def draw(
        self,
        name: str,
        targets: str,
        preset: str,
        prompts: Sequence[str],
        seeds: Sequence[int] = (1, 2),
        *,
        family: str = "sd15",
    ) -> Path:
        """Build a recipe whose previews are these prompts; return the folder of its pictures.

        targets: its tables; preset: the lines of its [preset] (`checkpoint = …`, `bake = …`, …).
        """
        recipe = (
            f'family = "{family}"\n{targets}\n[preset]\n{preset}\nexport = []\n[preset.previews]\n'
            f"prompts = {json.dumps(list(prompts), ensure_ascii=False)}\nseeds = {json.dumps(list(seeds))}\n"
            f"steps = {STEPS}\nguidance = {GUIDANCE}\n"
        )
        return self.build(name, recipe) / "previews"


def pictures(folder: Path, column: str, prompts: int, seeds: Sequence[int] = (1, 2)) -> list[Image.Image]:
    """Return the pictures of a column (a preset, or a checkpoint beside it), every seed of a prompt after the other."""
    return [Image.open(folder / f"{p + 1}-{seed}-{column}.png") for p in range(prompts) for seed in seeds]


def asked(count: int, style: str = "flat") -> list[tuple[Attributes, str]]:
    """Return held-out combinations of attributes and their captions."""
    return held_out_prompts(style, count)


@dataclass(frozen=True)
class Finding:
    """Two lots of values of one property, of the same pictures before and after.

    control: that nothing is to be seen here. bound: what the method's own assertion asks of `after` (or of whatever
    `note` says), and whether it was kept.
    """

    what: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    control: bool = False
    bound: str = ""
    kept: bool = True

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % bootstrap interval of the mean difference, pairs drawn with replacement."""
        differences = [b - a for a, b in zip(self.before, self.after, strict=True)]
        draw = random.Random(0)
        means = sorted(sum(draw.choices(differences, k=len(differences))) / len(differences) for _ in range(DRAWS))
        return means[int(0.025 * DRAWS)], means[int(0.975 * DRAWS) - 1]

    @property
    def holds(self) -> bool:
        low, high = self.interval
        apart = low > 0 or high < 0
        return apart != self.control and self.kept

    def row(self) -> str:
        low, high = self.interval
        mean = [sum(values) / len(values) for values in (self.before, self.after)]
        sign = "✓" if self.holds else "**✗**"
        wish = "nothing" if self.control else "a difference"
        return (
            f"| {self.what} | {len(self.after)} | {mean[0]:.3f} | {mean[1]:.3f} | {low:+.3f} … {high:+.3f} | "
            f"{wish}{'; ' + self.bound if self.bound else ''} | {sign} |"
        )


HEAD = "| what | pictures | before | after | difference, 95 % | wanted | |\n| --- | --: | --: | --: | --: | --- | --- |"


def values(drawn: Sequence[Image.Image], judge: Callable[[Image.Image], float]) -> tuple[float, ...]:
    """Return what a judge says of every picture, as a number."""
    return tuple(float(judge(picture)) for picture in drawn)
