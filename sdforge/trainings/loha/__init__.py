"""LoHa: updates that are products, number by number, of two low-rank ones (https://arxiv.org/abs/2309.14859)."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import final

from pydantic import Field

from sdforge.trainings import Shape, Updates, advise_updates

VERSION = 1
MAKES = "lora"


@final
class Loha(Updates):
    """W + (alpha / rank) · (w1_a @ w1_b) ⊙ (w2_a @ w2_b), of a rank up to rank² (FedPara, Hyeon-Woo et al. 2021).

    w1_a, w2_a: (out, rank); w1_b, w2_b: (rank, in · kernel). w2_a starts from zeros, the others from noise. The trained
    layers are those of `lora`.
    """

    rank: int = Field(8, ge=1, le=256, description="of each of the two updates of linear layers and 1×1 convolutions")

    def factors(self, weight: Shape, rank: int) -> Iterable[Shape]:
        return 2 * [(weight[0], rank), (rank, prod(weight[1:]))]


TABLE = Loha
advise = advise_updates
