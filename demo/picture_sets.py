"""The drawings that training uses, kept as arrays on disk. Training never draws a held-out combination."""

from __future__ import annotations

import random
from bisect import bisect
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from demo.attributes import Attributes, draw_combinations
from demo.drawing import draw
from demo.palettes import CHALK, FLAT, INK, LOOKS, Look, random_look
from demo.progress import say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

Pictures = npt.NDArray[np.uint8]


def combinations(look: str, count: int) -> list[Attributes]:
    """Return the training combinations of a style, always the same ones."""
    seed = {"flat": 1, "ink": 2}[look]
    return list(islice(draw_combinations(seed, held_out=False), count))


def base_pictures(look: Look, count: int, cache: Path) -> Pictures:
    """uint8 (count, 128, 128, 3): the training drawings of a base."""

    def make() -> Pictures:
        seeds = range(count)
        return np.stack(
            [np.asarray(draw(a, look, s)) for a, s in zip(combinations(look.name, count), seeds, strict=True)]
        )

    return _cached(cache / f"drawings-{look.name}-{count}.npy", make)


def autoencoder_pictures(cache: Path) -> Pictures:
    """uint8 (4500, 128, 128, 3): 42 % flat, 33 % ink, 10 % chalk, 15 % in styles that do not exist."""
    return _mixed_pictures(cache / "drawings-autoencoder.npy", 4500, seeds=(3, 1_000_000), until=(0.42, 0.75, 0.85))


def finishing_pictures(cache: Path) -> Pictures:
    """uint8 (7000, 128, 128, 3): those of `autoencoder_pictures` and more, so that chalk is 17 % of all."""
    more = _mixed_pictures(cache / "drawings-finishing.npy", 2500, seeds=(5, 1_050_000), until=(0.30, 0.60, 0.90))
    return np.concatenate([autoencoder_pictures(cache), more])


def _mixed_pictures(path: Path, count: int, *, seeds: tuple[int, int], until: tuple[float, float, float]) -> Pictures:
    """Draw in several styles.

    `seeds`: of the combinations and looks, and of the first drawing. `until`: the cumulative shares of flat, ink and
    chalk; the rest has looks that do not exist.
    """

    def make() -> Pictures:
        rng = random.Random(seeds[0])
        pictures = []
        for index, attributes in enumerate(islice(draw_combinations(seeds[0], held_out=False), count)):
            kind = bisect(until, rng.random())
            look = (FLAT, INK, CHALK)[kind] if kind < 3 else random_look(rng)
            pictures.append(np.asarray(draw(attributes, look, seeds[1] + index)))
        return np.stack(pictures)

    return _cached(path, make)


def styled_pictures(shown: Sequence[Attributes], styles: Sequence[str], seed: int, cache: Path) -> Pictures:
    """uint8 (N, 128, 128, 3): drawings of these combinations, each in its style."""

    def make() -> Pictures:
        pairs = zip(shown, styles, strict=True)
        return np.stack(
            [np.asarray(draw(a, LOOKS[s], 6_000_000 + seed * 10_000 + i)) for i, (a, s) in enumerate(pairs)]
        )

    return _cached(cache / f"drawings-styled-{seed}-{len(shown)}.npy", make)


def held_out_pictures(count: int = 24) -> dict[str, Pictures]:
    """uint8 (count, 128, 128, 3) of each style, of combinations that training never sees."""
    chosen = list(islice(draw_combinations(4, held_out=True), count))
    return {
        look.name: np.stack([np.asarray(draw(a, look, 2_000_000 + i)) for i, a in enumerate(chosen)])
        for look in (FLAT, INK, CHALK)
    }


def _cached(path: Path, make: Callable[[], Pictures]) -> Pictures:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        say(f"drawing {path.stem}")
        np.save(path, make())
    pictures: Pictures = np.load(path)
    return pictures
