"""LoKr: updates that are Kronecker products of small matrices (https://arxiv.org/abs/2309.14859)."""

from __future__ import annotations

from collections.abc import Iterable
from math import isqrt, prod
from typing import final

from pydantic import Field

from sdforge.trainings import Shape, Updates, advise_updates

VERSION = 1
MAKES = "lora"


@final
class Lokr(Updates):
    """W + (alpha / rank) · w1 ⊗ (w2_a @ w2_b) (KronA, Edalati et al. 2022, https://arxiv.org/abs/2212.10650).

    w1 is (f, g), where f and g are the largest divisors of out and in up to `factor` and to their square roots; w2 is
    (out/f, in/g[, k, k]). Where the rank saves nothing, or with `whole`, w2 is one matrix, and nothing is scaled. w1
    starts from noise, w2 from zeros. The trained layers are those of `lora`.
    """

    factor: int = Field(8, ge=-1, le=1024, description="largest edge of w1; −1 or 0: as square as can be")
    whole: bool = Field(False, description="keep w2 as one matrix, whatever the rank")

    def factors(self, weight: Shape, rank: int) -> Iterable[Shape]:
        first, second = self.edges(weight)
        yield first
        if self.is_whole(second, rank):
            yield second
        else:
            yield second[0], rank
            yield rank, prod(second[1:])

    def edges(self, weight: Shape) -> tuple[tuple[int, int], Shape]:
        """Return the shapes of w1 and w2 for a weight."""
        out, into, *kernel = weight
        first = split(out, self.factor), split(into, self.factor)
        return first, (out // first[0], into // first[1], *kernel)

    def is_whole(self, second: Shape, rank: int) -> bool:
        """Say whether w2 is one matrix: where it is asked for, and where two of this rank would save nothing."""
        return self.whole or rank >= max(second[:2]) / 2


def split(size: int, factor: int) -> int:
    """Return the smaller of the two sides into which a dimension is divided: the largest divisor up to its root.

    factor: the most it may be; one that divides the dimension is taken as it is (LyCORIS' rule). −1: no limit.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor)
    most = isqrt(size) if factor <= 0 else min(isqrt(size), factor)
    return next(n for n in range(most, 0, -1) if size % n == 0)


TABLE = Lokr
advise = advise_updates
