"""Matrices of the cross-attention and rows behind the token table are the parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from sdforge.errors import UsageError
from sdforge.run.adapter import Adapter, Group, Learned
from sdforge.run.diffusion import Diffusion
from sdforge.run.images import Picture
from sdforge.run.rows import new_word, starting_rows
from sdforge.run.seeds import generator
from sdforge.run.views import View, draw_view
from sdforge.trainings.custom_diffusion import chosen, facts

if TYPE_CHECKING:
    from sdforge.trainings.custom_diffusion import CustomDiffusion


def begin(settings: CustomDiffusion, diffusion: Diffusion) -> Adapter:
    """Let keys and values learn, and put the new word behind the vocabulary. Raises UsageError where there are none."""
    names = chosen(diffusion.family, settings.freeze)
    if not names:
        raise UsageError(f"{diffusion.family.title} has no keys and values of its own for what it is told")
    if any(len(diffusion.words.plain(word)) != 1 for word in settings.init.split()):
        raise UsageError(f"init = {settings.init!r} holds a word that is more than one token of the checkpoint")
    return _Concept(settings, diffusion, names)


@final
class _Concept(Adapter):
    text_is_frozen = False

    def __init__(self, settings: CustomDiffusion, diffusion: Diffusion, names: tuple[str, ...]) -> None:
        self.settings, self.diffusion = settings, diffusion
        self.varies = settings.augment
        seed = int(settings.seed or 0)
        start = starting_rows(diffusion, settings.init, settings.vectors, seed)
        self.rows = new_word(diffusion, settings.token, settings.vectors, start)
        own = dict(diffusion.unet.named_parameters())
        self.matrices = {name: own[name] for name in names}
        for weight in self.matrices.values():
            weight.requires_grad_(True)
        self.before = {name: weight.detach().clone() for name, weight in self.matrices.items()}
        for name in diffusion.family.cross_attention:
            diffusion.unet.get_submodule(name.removesuffix(".weight")).register_forward_hook(_leave_start)

    def view(self, picture: Picture, step: int) -> View:
        return draw_view(picture.size, generator(int(self.settings.seed or 0), f"view {picture.sha256}", step))

    def groups(self) -> list[Group]:
        rate = self.settings.learning_rate
        return [
            Group(dict(self.matrices), rate, self.settings.weight_decay),
            Group(dict(self.rows.parameters), rate * self.settings.token_rate, 0.0),
        ]

    def learned(self) -> Learned:
        matrices: dict[str, Tensor] = {f"unet.{name}": weight.detach() for name, weight in self.matrices.items()}
        update = [
            (name, (weight.detach() - self.before[name]).reshape(weight.shape[0], -1), None)
            for name, weight in self.matrices.items()
        ]
        rows: dict[str, Tensor] = {**self.rows.parameters}
        return Learned({"custom": matrices, "embedding": rows}, facts(self.settings), [*update, *self.rows.updates()])


def _leave_start(layer: nn.Module, inputs: Any, output_BLD: Tensor) -> Tensor:  # noqa: ARG001 -- torch's signature
    """Let no gradient through the start of text, the first token, which all prompts have in common."""
    return torch.cat([output_BLD[:, :1].detach(), output_BLD[:, 1:]], 1)
