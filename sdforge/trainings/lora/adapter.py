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
from sdforge.run.seeds import generator

if TYPE_CHECKING:
    from sdforge.trainings.lora import Lora

LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
RESIDUAL = ("time_emb_proj", "conv_shortcut")  # matrices of the residual blocks
CONV = ("conv1", "conv2", "conv")  # 3×3, of residual blocks and samplers
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def begin(settings: Lora, diffusion: Diffusion) -> Adapter:
    """Wrap the layers; up starts at zero, so that the first step predicts as the base does."""
    return _Lora(settings, diffusion)


@final
class _Lora(Adapter):
    def __init__(self, settings: Lora, diffusion: Diffusion) -> None:
        self.settings, self.diffusion = settings, diffusion
        self.text_is_frozen = not settings.text_encoder
        self.layers: dict[str, LoraLayer] = {}
        self.alphas: dict[str, float] = {}
        alpha = settings.alpha or float(settings.rank)
        self._wrap("unet", diffusion.unet, LINEAR, settings.rank, alpha)
        if settings.conv_rank:
            self._wrap("unet", diffusion.unet, RESIDUAL, settings.rank, alpha)
            conv_alpha = settings.conv_alpha or float(settings.conv_rank)
            self._wrap("unet", diffusion.unet, CONV, settings.conv_rank, conv_alpha)
        if settings.text_encoder:
            for name, encoder in diffusion.text_encoders.items():
                self._wrap(f"{name}.text_model", encoder, TEXT, settings.rank, alpha)
        for module, layer in sorted(self.layers.items()):
            layer.set_adapter(next(iter(layer.lora_A)))  # every injection leaves only its own layers active
            down, up = _factors(layer)
            draw = generator(int(settings.seed or 0), f"init {module}")
            bound = 1 / math.sqrt(down[0].numel())  # kaiming_uniform(√5), as kohya starts
            with torch.no_grad():
                down.copy_((torch.rand(down.shape, generator=draw) * 2 - 1) * bound)
                up.zero_()

    def _wrap(self, prefix: str, network: nn.Module, targets: tuple[str, ...], rank: int, alpha: float) -> None:
        """Put LoRA layers of one rank around the target layers of a network."""
        name = targets[0].replace(".", "_")
        wanted = [
            path
            for path, layer in network.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and path.endswith(tuple(f".{target}" for target in targets))
        ]
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=wanted, bias="none")
        with torch.random.fork_rng(devices=[]):  # PEFT's own start is drawn from the global generator
            inject_adapter_in_model(config, network, adapter_name=name)
        for path, layer in network.named_modules():
            if isinstance(layer, LoraLayer) and name in layer.lora_A:
                module = f"{prefix}.{path.removeprefix('text_model.')}"
                self.layers[module], self.alphas[module] = layer, alpha

    def groups(self) -> list[Group]:
        groups = []
        for part, rate in (("unet", self.settings.learning_rate), ("text", self.settings.text_learning_rate)):
            found: dict[str, nn.Parameter] = {}
            for module, layer in self.layers.items():
                if module.startswith(part):
                    down, up = _factors(layer)
                    found |= {f"{module}.lora_down": down, f"{module}.lora_up": up}
            if found:
                groups.append(Group(found, rate, self.settings.weight_decay))
        return groups

    def learned(self) -> Learned:
        tensors, update, ranks = {}, [], {}
        for module, layer in self.layers.items():
            down, up = (factor.detach() for factor in _factors(layer))
            down = down[:, :, 0, 0] if down.shape[2:] == (1, 1) else down
            up = up.reshape(up.shape[:2])
            tensors[f"{module}.lora_down"], tensors[f"{module}.lora_up"] = down, up
            ranks[module] = down.shape[0]
            scaled = up * (self.alphas[module] / ranks[module])
            update.append((module, scaled, down.reshape(down.shape[0], -1)))
        return Learned({"lora": tensors}, alpha_fact(self.alphas, ranks), update)


def _factors(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    (name,) = layer.lora_A.keys()
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    assert isinstance(down, Tensor)
    assert isinstance(up, Tensor)
    return down, up  # type: ignore[return-value]
