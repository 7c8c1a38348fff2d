"""LoRA: low-rank updates of linear layers and convolutions (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Annotated, final

from pydantic import Field

from sdforge.settings import Positive, Since
from sdforge.trainings import Shape, Updates, advise_updates

VERSION = 1
MAKES = "lora"


@final
class Lora(Updates):
    """W + (alpha / rank) · up @ down, with down: (rank, in) from noise and up: (out, rank) from zeros.

    The trained layers are those of kohya's scripts: every linear layer of the U-Net's transformers with their input
    and output projections; with `conv_rank` also the residual blocks and samplers, 3×3 convolutions with that rank and
    the rest with `rank` (LoCon, https://arxiv.org/abs/2309.14859). The pictures' captions are used as they are.
    """

    rslora: Annotated[bool, Since(2, False)] = Field(
        False, description="divide by √rank instead of the rank (https://arxiv.org/abs/2312.03732)"
    )
    plus: Annotated[Positive, Since(2, 1.0)] = Field(
        1.0, description="up's learning rate in those of down; 16 in LoRA+ (https://arxiv.org/abs/2402.12354)"
    )
    dora: Annotated[bool, Since(2, False)] = Field(
        False, description="learn every output row's length apart from its direction (https://arxiv.org/abs/2402.09353)"
    )

    def factors(self, weight: Shape, rank: int) -> Iterable[Shape]:
        yield rank, prod(weight[1:])
        yield weight[0], rank
        if self.dora:
            yield (weight[0],)


TABLE = Lora
advise = advise_updates
