"""Two sets of rows behind the token table; the prediction that is compared is the guided one."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from torch import Tensor

from sdforge.run.adapter import Adapter, Batch, Group, Learned
from sdforge.run.diffusion import Conditioning, Diffusion
from sdforge.run.rows import new_word, noise, starting_rows
from sdforge.run.tokens import swapped
from sdforge.trainings.dreamartist import facts, opposite

if TYPE_CHECKING:
    from sdforge.trainings.dreamartist import DreamArtist

APART = 1e-3  # noise between the sets: equal rows would leave nothing to guide away from


def begin(settings: DreamArtist, diffusion: Diffusion) -> Adapter:
    """Put the word and its opposite behind every text encoder's vocabulary, both begun as `init` says."""
    return _Words(settings, diffusion)


@final
class _Words(Adapter):
    text_is_frozen = False

    def __init__(self, settings: DreamArtist, diffusion: Diffusion) -> None:
        self.settings, self.diffusion = settings, diffusion
        self.opposite = opposite(settings.token)
        seed, many = int(settings.seed or 0), settings.negative_vectors
        start = starting_rows(diffusion, settings.init, settings.vectors, seed)
        away = starting_rows(diffusion, settings.init, many, seed, "init negative")
        for name, table in diffusion.token_tables().items():
            away[name] = away[name] + APART * noise(table, many, seed, f"apart {name}")
        self.positive = new_word(diffusion, settings.token, settings.vectors, start)
        self.negative = new_word(diffusion, self.opposite, many, away)

    def groups(self) -> list[Group]:
        rate, decay = self.settings.learning_rate, self.settings.weight_decay
        return [
            Group({f"positive.{name}": rows for name, rows in self.positive.parameters.items()}, rate, decay),
            Group(
                {f"negative.{name}": rows for name, rows in self.negative.parameters.items()},
                rate * self.settings.negative_rate,
                decay,
            ),
        ]

    def predict(self, batch: Batch, condition: Conditioning) -> Tensor:
        """Return what a sampler with guidance would go by, of one pass over every picture twice."""
        against = [swapped(caption, self.settings.token, self.opposite) for caption in batch.captions]
        if against == batch.captions:  # nothing to guide away from: both sides would say the same
            return self.diffusion.predict(batch.noisy_BCHW, batch.timesteps_B, condition)
        away = self.diffusion.sized(self.diffusion.encode_negative(against), batch.framings)
        both = Conditioning.stack([away, condition])
        pair = self.diffusion.predict(batch.noisy_BCHW.repeat(2, 1, 1, 1), batch.timesteps_B.repeat(2), both)
        away_BCHW, towards_BCHW = pair.chunk(2)
        return away_BCHW + self.settings.guidance * (towards_BCHW - away_BCHW)

    def stepped(self, step: int) -> None:  # noqa: ARG002 -- every step alike
        self.positive.clamp(self.settings.longest)
        self.negative.clamp(self.settings.longest)

    def learned(self) -> Learned:
        components = {"embedding": dict(self.positive.parameters), "negative": dict(self.negative.parameters)}
        update = [*self.positive.updates(), *self.negative.updates("negative ")]
        return Learned(components, facts(self.settings), update)  # type: ignore[arg-type]
