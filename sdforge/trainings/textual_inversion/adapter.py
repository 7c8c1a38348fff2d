"""Rows behind the token table are the only parameters; everything else is frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import nn

from sdforge.run.adapter import Adapter, Group, Learned
from sdforge.run.diffusion import Diffusion
from sdforge.run.seeds import generator

if TYPE_CHECKING:
    from sdforge.trainings.textual_inversion import TextualInversion


def begin(settings: TextualInversion, diffusion: Diffusion) -> Adapter:
    """Put the new word behind every text encoder's vocabulary, its rows as `init` says."""
    return _Rows(settings, diffusion)


@final
class _Rows(Adapter):
    text_is_frozen = False

    def __init__(self, settings: TextualInversion, diffusion: Diffusion) -> None:
        self.settings, self.diffusion = settings, diffusion
        diffusion.words.add(settings.token, settings.vectors)
        words = diffusion.words.plain(settings.init) if settings.init else []
        self.rows: dict[str, nn.Parameter] = {}
        self.start = {}
        for encoder, table in diffusion.token_tables().items():
            if words:
                start = table.weight[[words[i % len(words)] for i in range(settings.vectors)]].clone()
            else:
                # noise as wide as the table's own rows
                draw = generator(int(settings.seed or 0), f"init {encoder}")
                noise = torch.randn(settings.vectors, table.weight.shape[1], generator=draw)
                start = noise.to(table.weight.device) * table.weight.std()
            table.rows = nn.Parameter(start.float().clone())
            self.rows[encoder], self.start[encoder] = table.rows, start

    def groups(self) -> list[Group]:
        return [Group(dict(self.rows), self.settings.learning_rate, self.settings.weight_decay)]

    def learned(self) -> Learned:
        facts: dict[str, object] = {"token": self.settings.token}
        if self.settings.polarity == "negative":
            facts["polarity"] = "negative"
        update = [(name, rows.detach() - self.start[name], None) for name, rows in self.rows.items()]
        return Learned({"embedding": dict(self.rows)}, facts, update)  # type: ignore[arg-type]
