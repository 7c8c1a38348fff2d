"""LoKr: updates that are Kronecker products of small matrices (https://arxiv.org/abs/2309.14859)."""

from __future__ import annotations

from typing import final

from pydantic import Field

from sdforge.trainings import Updates, advise_updates

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


TABLE = Lokr
advise = advise_updates
