"""PEFT's LoRA layers in the places where kohya's scripts put them, started from our own random numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from sdforge.formats.lora import alpha_fact
from sdforge.run.adapter import Adapter, Group, Learned
from sdforge.run.diffusion import Diffusion
from sdforge.run.layers import LayerAdapter, Places, chosen_places
from sdforge.run.seeds import generator

if TYPE_CHECKING:
    from sdforge.trainings.lora import Lora


def begin(settings: Lora, diffusion: Diffusion) -> Adapter:
    """Wrap the layers; up starts at zero, so that the first step predicts as the base does."""
    return _Lora(settings, diffusion)


@final
class _Lora(LayerAdapter):
    def __init__(self, settings: Lora, diffusion: Diffusion) -> None:
        super().__init__(settings, diffusion)
        self.method = settings
        self.layers: dict[str, LoraLayer] = {}
        self.alphas: dict[str, float] = {}
        for places in chosen_places(settings, diffusion):
            self._wrap(places)
        for module, layer in sorted(self.layers.items()):
            layer.set_adapter(next(iter(layer.lora_A)))  # every injection leaves only its own layers active
            down, up = _factors(layer)
            draw = generator(int(settings.seed or 0), f"init {module}")
            bound = 1 / math.sqrt(down[0].numel())  # kaiming_uniform(√5), as kohya starts
            with torch.no_grad():
                down.copy_((torch.rand(down.shape, generator=draw) * 2 - 1) * bound)
                up.zero_()

    def _wrap(self, places: Places) -> None:
        """Put LoRA layers of one rank around layers of a network.

        PEFT divides alpha by the rank. Where it should be divided by the rank's square root, alpha is multiplied by
        it, and is kept so: what reads the result divides by the rank (rsLoRA, https://arxiv.org/abs/2312.03732).
        """
        alpha = places.alpha * (math.sqrt(places.rank) if self.method.rslora else 1.0)
        wanted = list(places.paths.values())
        name = f"update{len(self.layers)}"
        config = LoraConfig(
            r=places.rank, lora_alpha=alpha, target_modules=wanted, bias="none", use_dora=self.method.dora
        )
        with torch.random.fork_rng(devices=[]):  # PEFT's own start is drawn from the global generator
            inject_adapter_in_model(config, places.network, adapter_name=name)
        for module, path in places.paths.items():
            layer = places.network.get_submodule(path)
            assert isinstance(layer, LoraLayer)
            self.layers[module], self.alphas[module] = layer, alpha

    def switch(self, *, on: bool) -> None:
        for layer in self.layers.values():
            layer.enable_adapters(on)

    def groups(self) -> list[Group]:
        found: dict[str, nn.Parameter] = {}
        for module, layer in self.layers.items():
            down, up = _factors(layer)
            found |= {f"{module}.lora_down": down, f"{module}.lora_up": up}
            if self.method.dora:
                found[f"{module}.dora_scale"] = _magnitude(layer)
        groups = self._groups(found)
        if self.method.plus == 1:
            return groups
        return [part for group in groups for part in _parted(group, self.method.plus)]

    def learned(self) -> Learned:
        tensors: dict[str, Tensor] = {}
        update: list[tuple[str, Tensor, Tensor | None]] = []
        ranks = {}
        for module, layer in self.layers.items():
            down, up = (factor.detach() for factor in _factors(layer))
            down = down[:, :, 0, 0] if down.shape[2:] == (1, 1) else down
            up = up.reshape(up.shape[:2])
            tensors[f"{module}.lora_down"], tensors[f"{module}.lora_up"] = down, up
            ranks[module] = down.shape[0]
            scaled = up * (self.alphas[module] / ranks[module])
            flat = down.reshape(down.shape[0], -1)
            if self.method.dora:
                magnitude = _magnitude(layer).detach().reshape(-1, 1)
                tensors[f"{module}.dora_scale"] = magnitude
                weight = layer.get_base_layer().weight
                assert isinstance(weight, Tensor)
                value = weight.flatten(1) + scaled @ flat
                update.append((module, magnitude * value / value.norm(dim=1, keepdim=True) - weight.flatten(1), None))
            else:
                update.append((module, scaled, flat))
        return Learned({"lora": tensors}, alpha_fact(self.alphas, ranks), update)


def _factors(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    (name,) = layer.lora_A.keys()
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    assert isinstance(down, nn.Parameter)
    assert isinstance(up, nn.Parameter)
    return down, up


def _magnitude(layer: LoraLayer) -> nn.Parameter:
    (found,) = layer.lora_magnitude_vector.values()
    assert isinstance(found.weight, nn.Parameter)
    return found.weight


def _parted(group: Group, ratio: float) -> list[Group]:
    """Return a group in two: up learns faster than the rest (LoRA+, Hayou et al. 2024)."""
    ups = {name: parameter for name, parameter in group.parameters.items() if name.endswith(".lora_up")}
    rest = {name: parameter for name, parameter in group.parameters.items() if name not in ups}
    return [
        Group(rest, group.learning_rate, group.weight_decay),
        Group(ups, group.learning_rate * ratio, group.weight_decay),
    ]
