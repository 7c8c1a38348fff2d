"""Artifacts that no weights can hold: what draws with them, for our own networks and for pipelines of diffusers.

A module is a kind, and its name is the kind's. One that takes part in every picture is `Attached`; one that has
pictures of its own is `Replayed`. tensors: as the artifact names them (see `formats.own`); facts: the artifact's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from torch import Tensor

    from sdforge.run.diffusion import Diffusion

    Tensors = dict[str, Tensor]


class Attached(Protocol):
    """A kind that changes how every prompt is drawn."""

    def attach(self, diffusion: Diffusion, tensors: Tensors, facts: dict[str, Any]) -> Callable[[], None]:
        """Let a loaded checkpoint draw with it; return what takes it off again. Raises UsageError where it cannot."""
        ...

    def attach_pipeline(self, pipeline: Any, tensors: Tensors, facts: dict[str, Any]) -> None:
        """Let a pipeline of diffusers draw with it from now on. Raises UsageError where it cannot."""
        ...


class Replayed(Protocol):
    """A kind that draws pictures of its own, and edits of them by other prompts."""

    def replay(
        self, diffusion: Diffusion, tensors: Tensors, facts: dict[str, Any], prompt: str | None = None
    ) -> Tensor:
        """Return a picture (1, 3, H, W) in −1 … 1, by default of the prompt that the facts name."""
        ...

    def plain(self, diffusion: Diffusion, tensors: Tensors) -> Tensors:
        """Return what `replay` is to be given to show the same picture without what was found."""
        ...

    def attach_pipeline(self, pipeline: Any, tensors: Tensors, facts: dict[str, Any]) -> Callable[..., Any]:
        """Return `draw(prompt=None, **more)`, which draws with a pipeline of diffusers; that is left as it was."""
        ...


def replayed(kind: str) -> Replayed | None:
    """Return the module of a kind that has pictures of its own, or None."""
    found = importlib.import_module(f"sdforge.sidecars.{kind}")
    return cast("Replayed", found) if hasattr(found, "replay") else None


def attached(kind: str) -> Attached | None:
    """Return the module of a kind that takes part in every picture, or None."""
    found = importlib.import_module(f"sdforge.sidecars.{kind}")
    return cast("Attached", found) if hasattr(found, "attach") else None
