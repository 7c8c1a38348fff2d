"""The small networks are the parameters; everything else is frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from sdforge.errors import UsageError
from sdforge.run.adapter import Adapter, Batch, Group, Learned
from sdforge.run.diffusion import Conditioning, Diffusion
from sdforge.run.hypernetwork import Net, contexts, make_nets, wrap
from sdforge.run.seeds import generator
from sdforge.trainings.hypernetwork import facts

if TYPE_CHECKING:
    from sdforge.trainings.hypernetwork import Hypernetwork


def begin(settings: Hypernetwork, diffusion: Diffusion) -> Adapter:
    """Put a pair of networks before the attentions of every width. Raises UsageError where there is none."""
    widths = {width for _, _, width in contexts(diffusion.unet, settings.attention)}
    if not widths:
        raise UsageError(f"{diffusion.family.title} has no keys and values of its own for what it is told")
    return _Networks(settings, diffusion, sorted(widths))


@final
class _Networks(Adapter):
    def __init__(self, settings: Hypernetwork, diffusion: Diffusion, widths: list[int]) -> None:
        self.settings, self.diffusion = settings, diffusion
        self.seed, self.step = int(settings.seed or 0), 0
        self.rows: tuple[int, ...] = ()  # of a batch that is computed in parts: see `Batch`
        self.whole = 0
        self.nets = make_nets(widths, facts(settings))
        for (width, side), net in self.nets.items():
            _begin_at_zero(net, self.seed, f"{width}.{side}")
            net.to(diffusion.device)
        wrap(diffusion.unet, self.nets, facts(settings), drop=self._drop if settings.dropout else None)
        self.parameters: dict[str, nn.Parameter] = {
            f"{width}.{side}.{name}": parameter
            for (width, side), net in self.nets.items()
            for name, parameter in net.named_parameters()
        }
        self.start = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def begins(self, step: int) -> None:
        self.step = step

    def predict(self, batch: Batch, condition: Conditioning) -> Tensor:
        self.rows, self.whole = batch.rows, batch.whole
        return super().predict(batch, condition)

    def _drop(self, x_BLD: Tensor, place: str) -> Tensor:
        """Leave parts out where something is learned; which ones depends on seed, step and place alone.

        They are drawn for the whole batch, so that a picture's are the same in whatever part it is computed.
        """
        if not torch.is_grad_enabled():
            return x_BLD
        draw = generator(self.seed, f"dropout {place}", self.step)
        kept_BLD = torch.rand((self.whole or len(x_BLD), *x_BLD.shape[1:]), generator=draw) >= self.settings.dropout
        if self.rows:
            kept_BLD = kept_BLD[list(self.rows)]
        return x_BLD * (kept_BLD.to(x_BLD.device) / (1 - self.settings.dropout))

    def groups(self) -> list[Group]:
        return [Group(dict(self.parameters), self.settings.learning_rate, self.settings.weight_decay)]

    def learned(self) -> Learned:
        tensors: dict[str, Tensor] = {**self.parameters}
        update = [
            (name, (parameter.detach() - self.start[name]).reshape(parameter.shape[0], -1), None)
            for name, parameter in self.parameters.items()
        ]
        return Learned({"hypernetwork": tensors}, facts(self.settings), update)


@torch.no_grad()
def _begin_at_zero(net: Net, seed: int, name: str) -> None:
    """Draw all layers, bounded as torch bounds them; the last matrix (or the gain of the norm behind it) is 0."""
    last = net.count - 1
    for i, linear in enumerate(net.linear):
        assert isinstance(linear, nn.Linear)
        draw = generator(seed, f"init {name}.{i}")
        bound = linear.in_features**-0.5
        linear.weight.copy_((torch.rand(linear.weight.shape, generator=draw) * 2 - 1) * bound)
        linear.bias.zero_()
        if i == last and not net.norm:
            linear.weight.zero_()
        elif i == last:
            gain = net.norm[i].weight
            assert isinstance(gain, Tensor)
            gain.zero_()
