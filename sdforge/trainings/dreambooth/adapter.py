"""A fine-tuning whose pictures all say the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdforge.run.adapter import Adapter
from sdforge.run.diffusion import Diffusion
from sdforge.trainings.fine_tune.adapter import WeightsAdapter

if TYPE_CHECKING:
    from sdforge.trainings.dreambooth import Dreambooth


def begin(settings: Dreambooth, diffusion: Diffusion) -> Adapter:
    """Let the chosen weights learn what `prompt` names."""
    own = settings.captions
    return WeightsAdapter(settings, diffusion, lambda caption: (own and caption) or settings.prompt)
