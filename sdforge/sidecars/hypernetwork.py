"""Draw with a hypernetwork as it is: one that is not linear cannot be baked.

tensors: `768.k.linear.0.weight`, …; facts: `structure`, `activation`, … (see `formats.hypernetwork`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sdforge.run import hypernetwork
from sdforge.run.diffusion import Diffusion


def attach(
    diffusion: Diffusion, tensors: dict[str, Tensor], facts: dict[str, Any], strength: float = 1.0
) -> Callable[[], None]:
    """Let a loaded checkpoint see its contexts through the networks; return what takes them away.

    Raises UsageError for a width that no attention has.
    """
    return hypernetwork.attach(diffusion.unet, tensors, facts, strength)


def attach_pipeline(pipeline: Any, tensors: dict[str, Tensor], facts: dict[str, Any], strength: float = 1.0) -> None:
    """Let a pipeline of diffusers do the same from now on, also after it has been moved to another device."""
    hypernetwork.attach(pipeline.unet, tensors, facts, strength)
