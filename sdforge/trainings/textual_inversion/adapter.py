"""Rows behind the token table are the only parameters; everything else is frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from sdforge.run.adapter import Adapter, Group, Learned
from sdforge.run.diffusion import Diffusion
from sdforge.run.rows import new_word, starting_rows
from sdforge.trainings.textual_inversion import facts

if TYPE_CHECKING:
    from sdforge.trainings.textual_inversion import TextualInversion


def begin(settings: TextualInversion, diffusion: Diffusion) -> Adapter:
    """Put the new word behind every text encoder's vocabulary, its rows as `init` says."""
    return _Word(settings, diffusion)


@final
class _Word(Adapter):
    text_is_frozen = False

    def __init__(self, settings: TextualInversion, diffusion: Diffusion) -> None:
        self.settings, self.diffusion = settings, diffusion
        start = starting_rows(diffusion, settings.init, settings.vectors, int(settings.seed or 0))
        self.rows = new_word(diffusion, settings.token, settings.vectors, start)

    def groups(self) -> list[Group]:
        return [Group(dict(self.rows.parameters), self.settings.learning_rate, self.settings.weight_decay)]

    def stepped(self, step: int) -> None:  # noqa: ARG002 -- every step alike
        self.rows.clamp(self.settings.longest)

    def learned(self) -> Learned:
        return Learned({"embedding": dict(self.rows.parameters)}, facts(self.settings), self.rows.updates())
