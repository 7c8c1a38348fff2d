"""SD 2.x tensors → a `Diffusion`."""

from __future__ import annotations

import torch

from sdforge.families.load import WordsAlone, common
from sdforge.families.sd2 import FAMILY
from sdforge.order import Given
from sdforge.run.diffusion import Diffusion


def load(given: Given, device: torch.device, precision: torch.dtype) -> Diffusion:
    """Build the networks of a checkpoint from an order's input. Raises UsageError if a part is missing.

    precision: of the frozen networks' arithmetic; their weights are kept in fp32 all the same.
    """
    return WordsAlone(**common(FAMILY, given, device, precision))
