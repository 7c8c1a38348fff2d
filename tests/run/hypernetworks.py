"""Random hypernetworks for the toys, whose attentions see contexts 8 and 16 wide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdforge.formats.hypernetwork import SIDES, shapes_of, stated
from tests.families.workbench import Taken, keep

WIDTHS = (8, 16)  # of self-attention both, of cross-attention the second
DEEP = [1.0, 2.0, 1.5, 1.0]


def random_nets(
    facts: dict[str, Any], *, widths: tuple[int, ...] = WIDTHS, seed: int = 0, size: float = 0.2
) -> dict[str, Tensor]:
    """Return tensors of networks for these widths, none of them zero."""
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{width}.{side}.{name}": size * torch.randn(shape, generator=draw)
        for width in widths
        for side in SIDES
        for name, shape in shapes_of(width, facts).items()
    }


def kept(work: Path, facts: dict[str, Any], **more: Any) -> Taken:
    """Return a random hypernetwork as a training leaves it in the store."""
    return keep(work, {"hypernetwork": random_nets(facts, **more)}, kind="hypernetwork", facts=facts)


LINEAR = stated([1.0, 2.0, 1.0])
CROSS = stated([1.0, 2.0, 1.0], attention="cross")
SWISH = stated(DEEP, activation="swish", attention="cross")
