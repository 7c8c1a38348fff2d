"""Hypernetworks at work: what attentions make keys and values of goes through a small network first.

k = W_k h_K(c), v = W_v h_V(c) with h(x) = x + m · MLP(x) and strength m. Several are applied one after the other. There
is no paper; the form is NovelAI's, described by A1111's `modules/hypernetworks`. Shapes in names: B contexts, L places
of them, D their width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdforge.errors import UsageError
from sdforge.formats.hypernetwork import SIDES, check_shapes, fact, layers_of, shapes_of, widths_of
from sdforge.identity import Json

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": functional.relu,
    "leakyrelu": functional.leaky_relu,
    "elu": functional.elu,
    "swish": functional.hardswish,  # what A1111 calls so
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
Drop = Callable[[Tensor, str], Tensor]  # a layer's output, and where it comes from → the same with parts left out


@final
class Net(nn.Module):
    """The network of one width and side; its parameters are called as in the artifact."""

    def __init__(self, width: int, facts: dict[str, Json]) -> None:
        super().__init__()
        self.count = layers_of(facts)
        self.activation = ACTIVATIONS[fact(facts, "activation")]
        self.activate_output = bool(fact(facts, "activate_output"))
        shapes = shapes_of(width, facts)
        sizes = [shapes[f"linear.{i}.weight"] for i in range(self.count)]
        self.linear = nn.ModuleList(nn.Linear(inner, outer) for outer, inner in sizes)
        normed = self.count if fact(facts, "layer_norm") else 0
        self.norm = nn.ModuleList(nn.LayerNorm(shapes[f"norm.{i}.weight"]) for i in range(normed))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, x_BLD: Tensor, drop: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Return MLP(x); drop: what is done to the output of every layer but the last, by its number."""
        for i, linear in enumerate(self.linear):
            x_BLD = linear(x_BLD)
            last = i == self.count - 1
            if not last or self.activate_output:
                x_BLD = self.activation(x_BLD)
            if self.norm:
                x_BLD = self.norm[i](x_BLD)
            if not last:
                x_BLD = drop(x_BLD, i)
        return x_BLD


Nets = dict[tuple[int, str], Net]  # (width of the context, side) → network


def attach(
    unet: nn.Module, tensors: dict[str, Tensor], facts: dict[str, Json], strength: float = 1.0
) -> Callable[[], None]:
    """Let a diffusers U-Net see its contexts through a hypernetwork, behind those that are attached already.

    Returns what takes it off again. Raises UsageError for tensors that are not what the facts say, and for a width
    that no attention has.
    """
    check_shapes("the hypernetwork", {name: tuple(tensor.shape) for name, tensor in tensors.items()}, facts)
    nets = make_nets(widths_of(list(tensors)), facts)
    for (width, side), net in nets.items():
        start = f"{width}.{side}."
        own = {name.removeprefix(start): t.detach().float() for name, t in tensors.items() if name.startswith(start)}
        net.load_state_dict(own)
        net.requires_grad_(False)
    return wrap(unet, nets, facts, strength)


def make_nets(widths: list[int], facts: dict[str, Json]) -> Nets:
    """Return networks for these widths of contexts, in fp32 on the CPU, begun as torch begins layers."""
    with torch.random.fork_rng(devices=[]):
        return {(width, side): Net(width, facts) for width in widths for side in SIDES}


def wrap(
    unet: nn.Module, nets: Nets, facts: dict[str, Json], strength: float = 1.0, drop: Drop | None = None
) -> Callable[[], None]:
    """Put networks before the layers that make keys and values; return what takes them away.

    Raises UsageError for a width that none has.
    """
    places = contexts(unet, str(fact(facts, "attention")))
    known = {width for _, _, width in places}
    if lost := sorted({width for width, _ in nets} - known):
        there = ", ".join(map(str, sorted(known)))
        raise UsageError(
            f"the hypernetwork is for contexts {lost[0]} wide, and the U-Net's are {there}",
            hint="it was made for another family",
        )
    hooks = [
        unet.get_submodule(path).register_forward_pre_hook(_through(nets[width, side], strength, path, drop))
        for path, side, width in places
        if (width, side) in nets and strength
    ]

    def take_off() -> None:
        for hook in hooks:
            hook.remove()

    return take_off


def contexts(unet: nn.Module, attention: str) -> list[tuple[str, str, int]]:
    """Return path, side (`k`, `v`) and width of what attentions make keys and values of.

    attention: `cross` (where that is the conditioning) or `all`.
    """
    found = []
    for path, layer in unet.named_modules():
        parent, _, name = path.rpartition(".")
        here = attention == "all" or parent.endswith("attn2")
        if here and name in ("to_k", "to_v") and isinstance(layer, nn.Linear):
            found.append((path, name[-1], layer.in_features))
    return found


def _through(net: Net, strength: float, path: str, drop: Drop | None) -> Callable[[nn.Module, Any], Any]:
    def dropped(x_BLD: Tensor, layer: int) -> Tensor:
        return drop(x_BLD, f"{path} {layer}") if drop else x_BLD

    def through(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: ARG001 -- torch's signature
        context_BLD, *rest = inputs
        if net.device != context_BLD.device:  # the U-Net has been moved
            net.to(context_BLD.device)
        changed_BLD = net(context_BLD.float(), dropped)
        return (context_BLD + strength * changed_BLD.to(context_BLD.dtype), *rest)

    return through
