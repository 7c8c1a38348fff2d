"""Kronecker products beside layers, started as LyCORIS starts them: kaiming's bounds, and zeros in w2 (w2_b)."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from sdforge.run.adapter import Adapter
from sdforge.run.diffusion import Diffusion
from sdforge.run.layers import Beside, BesideAdapter

if TYPE_CHECKING:
    from sdforge.trainings.lokr import Lokr


def begin(settings: Lokr, diffusion: Diffusion) -> Adapter:
    """Wrap the layers; w2 starts at zero, so that the first step predicts as the base does."""
    return BesideAdapter(settings, diffusion, partial(_Kronecker, settings))


@final
class _Kronecker(Beside):
    """w1 ⊗ w2, with w2 = w2_a @ w2_b where the rank is less than half of its larger side."""

    def __init__(
        self,
        settings: Lokr,
        layer: nn.Linear | nn.Conv2d,
        rank: int,
        alpha: float,
        draw: torch.Generator,
    ) -> None:
        super().__init__(layer, alpha)
        first, self.second = settings.edges(tuple(layer.weight.shape))
        self.lokr_w1 = nn.Parameter(_kaiming(first, draw))
        if settings.is_whole(self.second, rank):
            self.lokr_w2 = nn.Parameter(torch.zeros(self.second))
        else:
            self.rank = rank
            self.lokr_w2_a = nn.Parameter(_kaiming((self.second[0], rank), draw))
            self.lokr_w2_b = nn.Parameter(torch.zeros(rank, math.prod(self.second[1:])))

    def product(self) -> Tensor:
        second = (self.lokr_w2_a @ self.lokr_w2_b).reshape(self.second) if self.rank else self.lokr_w2
        kernel = [1] * (second.dim() - 2)
        return torch.kron(self.lokr_w1.reshape(*self.lokr_w1.shape, *kernel), second)


def _kaiming(shape: tuple[int, int], draw: torch.Generator) -> Tensor:
    """Return numbers of kaiming_uniform(√5)."""
    return (torch.rand(shape, generator=draw) * 2 - 1) / math.sqrt(shape[1])
