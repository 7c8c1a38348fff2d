"""The networks' own weights are the parameters: those of the chosen blocks and layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from sdforge.order import Given, Order
from sdforge.ref import Ref
from sdforge.run.adapter import Adapter, Group, Learned
from sdforge.run.diffusion import Diffusion
from sdforge.run.images import Picture
from sdforge.run.tensors import load
from sdforge.trainings.fine_tune import chosen

if TYPE_CHECKING:
    from sdforge.trainings.fine_tune import FineTune, Weights


def begin(settings: FineTune, diffusion: Diffusion) -> Adapter:
    """Let the chosen weights learn, from where they stand."""
    return WeightsAdapter(settings, diffusion)


@final
class WeightsAdapter(Adapter):
    """Trains weights where they are. says: what the caption of a picture becomes."""

    def __init__(
        self, settings: Weights, diffusion: Diffusion, says: Callable[[str], str] = lambda caption: caption
    ) -> None:
        self.settings, self.diffusion, self.says = settings, diffusion, says
        self.text_is_frozen = not settings.text_encoder
        self.on: Given | None = None
        self.networks = {"unet": diffusion.unet}
        names = chosen(settings, diffusion.family)
        self.learning = {"unet": {name: p for name, p in diffusion.unet.named_parameters() if name in names}}
        if settings.text_encoder:
            self.networks |= diffusion.text_encoders
            self.learning |= {name: dict(text.named_parameters()) for name, text in diffusion.text_encoders.items()}
        for parameters in self.learning.values():
            for parameter in parameters.values():
                if settings.weights == "bf16":
                    parameter.data = parameter.data.to(torch.bfloat16)
                parameter.requires_grad_(True)

    def prepare(self, order: Order, pictures: list[Picture]) -> None:  # noqa: ARG002 -- it looks at the checkpoint
        self.on = order.the("on")

    def caption(self, caption: str) -> str:
        return self.says(caption)

    def groups(self) -> list[Group]:
        settings = self.settings
        rates = {"unet": settings.learning_rate}
        return [
            Group(parameters, rates.get(name, settings.text_learning_rate), settings.weight_decay)
            for name, parameters in self.learning.items()
        ]

    def learned(self) -> Learned:
        """Return the components of which something was trained, whole.

        What was not trained is as it lies in the checkpoint: a network may hold it rounded to what it computes in.
        """
        assert self.on is not None, "prepare comes first"
        found = Learned({})
        for component, network in self.networks.items():
            named, mine = dict(network.named_parameters()), self.learning[component]
            refs = {_within(named, ref.name): ref for ref in self.on.components[component]}
            found.components[component] = {
                ref.name: mine[name].detach() if name in mine else load(ref) for name, ref in refs.items()
            }
            # all differences together are as large as the network: each is made when its turn comes
            found.update = [
                *found.update,
                *(
                    (f"{component}.{refs[name].name}", partial(_difference, parameter.detach(), refs[name]), None)
                    for name, parameter in mine.items()
                ),
            ]
        return found


def _within(named: dict[str, nn.Parameter], name: str) -> str:
    """Return what a network calls a tensor: text encoders are built without the model around their layers."""
    inner = name.removeprefix("text_model.")
    return inner if inner in named else name


def _difference(now: Tensor, before: Ref) -> Tensor:
    """Return how a weight has moved, as a matrix."""
    moved = now.float().cpu() - load(before).float()
    return moved.reshape(moved.shape[0], -1)
