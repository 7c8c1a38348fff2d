"""Random LoRAs for the toy checkpoint, and the files that other programs would write of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdforge.formats.kohya import kohya_names
from sdforge.formats.lora import alpha_fact
from tests.families.workbench import SD15, Taken, keep

LINEAR = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CROSS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
NARROW = "unet.up_blocks.3.attentions.2.proj_in"  # a 1×1 convolution
WIDE = "unet.down_blocks.1.resnets.0.conv1"  # 3×3
DOWN = "unet.down_blocks.0.downsamplers.0.conv"  # 3×3, of stride 2
TEXT = "text_encoder.text_model.encoder.layers.1.mlp.fc1"
MODULES = (LINEAR, CROSS, NARROW, WIDE, DOWN, TEXT)


class Factors(NamedTuple):
    """One module's update alpha / rank · up @ down; down has the layer's kernel, up is a matrix."""

    up: Tensor
    down: Tensor
    alpha: float

    @property
    def update(self) -> Tensor:
        """The update in fp64, as (out, in · kernel)."""
        down = self.down.double().reshape(self.down.shape[0], -1)
        return self.alpha / self.down.shape[0] * (self.up.double() @ down)


Lora = dict[str, Factors]


def random_lora(
    base: Taken, modules: tuple[str, ...] = MODULES, *, seed: int = 0, alphas: tuple[float, ...] = (2.0,)
) -> Lora:
    """Return random factors of rank 2 (4 for 3×3 convolutions), alphas in turn, in fp16."""
    draw, lora = torch.Generator().manual_seed(seed), {}
    for i, module in enumerate(modules):
        component, _, path = module.partition(".")
        (out, *rest) = next(t.shape for t in base.tables[component] if t.name == f"{path}.weight")
        rank = 4 if rest[1:] == [3, 3] else 2
        down = 0.3 * torch.randn(rank, *(rest[:1] if rest[1:] == [1, 1] else rest), generator=draw)
        up = 0.3 * torch.randn(out, rank, generator=draw)
        lora[module] = Factors(up.half(), down.half(), alphas[i % len(alphas)])
    return lora


def kept_lora(work: Path, lora: Lora) -> Taken:
    """Return a LoRA as a training leaves it in the store."""
    tensors = {f"{m}.lora_{side}": getattr(f, side) for m, f in lora.items() for side in ("up", "down")}
    ranks = {module: factors.down.shape[0] for module, factors in lora.items()}
    facts = alpha_fact({module: factors.alpha for module, factors in lora.items()}, ranks)
    return keep(work, {"lora": tensors}, kind="lora", facts=facts)


def write_kohya(path: Path, lora: Lora, *, alpha: bool = True) -> Path:
    """Write a LoRA as kohya's scripts do."""
    names = kohya_names(SD15)
    tensors: dict[str, Tensor] = {}
    for module, factors in lora.items():
        up, down = factors.up, factors.down
        if SD15.is_conv(module):
            up, down = up[..., None, None], down if down.dim() == 4 else down[..., None, None]
        tensors |= {f"{names[module]}.lora_up.weight": up, f"{names[module]}.lora_down.weight": down}
        if alpha:
            tensors[f"{names[module]}.alpha"] = torch.tensor(factors.alpha)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def live(network: nn.Module, component: str, lora: Lora) -> None:
    """Put a LoRA's layers into a network with PEFT."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    own = {m.partition(".")[2].removeprefix("text_model."): f for m, f in lora.items() if m.startswith(component)}
    for path, factors in own.items():
        rank = factors.down.shape[0]
        config = LoraConfig(r=rank, lora_alpha=factors.alpha, target_modules=[path], bias="none")
        inject_adapter_in_model(config, network, adapter_name=path.replace(".", "_"))
    layers = {path: layer for path, layer in network.named_modules() if isinstance(layer, LoraLayer)}
    for path, layer in layers.items():
        name, factors = path.replace(".", "_"), own[path]
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        with torch.no_grad():
            a.copy_(factors.down.reshape(a.shape))
            b.copy_(factors.up.reshape(b.shape))
        layer.set_adapter(name)
