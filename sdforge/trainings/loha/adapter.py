"""Hadamard products beside layers, started as LyCORIS starts them: w1_a from a tenth of the normal distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from sdforge.run.adapter import Adapter
from sdforge.run.diffusion import Diffusion
from sdforge.run.layers import Beside, BesideAdapter

if TYPE_CHECKING:
    from sdforge.trainings.loha import Loha

STARTS = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0, "hada_w2_b": 1.0}  # deviations


def begin(settings: Loha, diffusion: Diffusion) -> Adapter:
    """Wrap the layers; w2_a starts at zero, so that the first step predicts as the base does."""
    return BesideAdapter(settings, diffusion, _Hadamard)


@final
class _Hadamard(Beside):
    """(w1_a @ w1_b) ⊙ (w2_a @ w2_b) (FedPara, https://arxiv.org/abs/2108.06098, eq. 1)."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float, draw: torch.Generator) -> None:
        super().__init__(layer, alpha)
        self.rank = rank
        out, inner = layer.weight.shape[0], layer.weight[0].numel()
        for name, deviation in STARTS.items():
            shape = (out, rank) if name.endswith("_a") else (rank, inner)
            setattr(self, name, nn.Parameter(deviation * torch.randn(shape, generator=draw)))

    def product(self) -> Tensor:
        f = self.factors()
        found = (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"])
        return found.reshape(self.layer.weight.shape)
