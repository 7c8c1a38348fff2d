"""Rows of a new word behind the token tables of all text encoders: how they begin, and how long they may become.

Shapes in names: N rows, D the width of a text encoder's table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdforge.run.diffusion import Diffusion, TokenTable
from sdforge.run.seeds import generator


@dataclass(frozen=True)
class Rows:
    """What is trained of one word: text encoder → its rows, and where they began."""

    tables: dict[str, TokenTable]
    parameters: dict[str, nn.Parameter]
    start: dict[str, Tensor]

    def updates(self, purpose: str = "") -> list[tuple[str, Tensor, Tensor | None]]:
        """Return how far every row has come, for the sketch of an update."""
        return [(f"{purpose}{name}", rows.detach() - self.start[name], None) for name, rows in self.parameters.items()]

    @torch.no_grad()
    def clamp(self, most: float) -> None:
        """Shorten rows that are longer than `most` times the median of their table's; 0: leave them.

        A row whose norm grows without bound draws all attention to itself.
        """
        for name, rows_ND in self.parameters.items() if most else ():
            limit = most * self.tables[name].weight.norm(dim=1).median()
            rows_ND.mul_((limit / rows_ND.norm(dim=1, keepdim=True)).clamp_max(1))


def new_word(diffusion: Diffusion, word: str, count: int, start: dict[str, Tensor]) -> Rows:
    """Append a word whose rows begin as `start` (text encoder → (N, D)) says."""
    diffusion.words.add(word, count)
    tables = diffusion.token_tables()
    return Rows(tables, {name: table.append(start[name]) for name, table in tables.items()}, start)


def starting_rows(diffusion: Diffusion, init: str, count: int, seed: int, purpose: str = "init") -> dict[str, Tensor]:
    """Return text encoder → (N, D): the rows of the words of `init` in turns, or noise as wide as the table's rows."""
    words = diffusion.words.plain(init) if init else []
    found = {}
    for name, table in diffusion.token_tables().items():
        if words:
            found[name] = table.weight[[words[i % len(words)] for i in range(count)]].detach().clone()
        else:
            found[name] = noise(table, count, seed, f"{purpose} {name}") * table.weight.std()
    return found


def noise(table: TokenTable, count: int, seed: int, purpose: str) -> Tensor:
    """Return normal noise (N, D) beside a table."""
    drawn_ND = torch.randn(count, table.weight.shape[1], generator=generator(seed, purpose))
    return drawn_ND.to(table.weight.device)
