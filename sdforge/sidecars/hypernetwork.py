"""Draw with a hypernetwork that is not linear, and so cannot be baked."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sdforge.run import hypernetwork


def attach(owner: Any, tensors: dict[str, Tensor], facts: dict[str, Any], strength: float = 1.0) -> None:
    """Let the U-Net of a `Diffusion` or of a diffusers pipeline (`owner.unet`) see its contexts through the networks.

    Raises UsageError for a width that no attention has.
    """
    hypernetwork.attach(owner.unet, tensors, facts, strength)
