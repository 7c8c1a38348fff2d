"""What one writes without any tool: load whole files, compute in fp32, save. `script.py JOB SHARE OUT INPUT …`"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def weighted_sum(share: float, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.lerp(a[name].float(), b[name].float(), share).half() for name in a}


def add_difference(
    share: float, a: dict[str, Tensor], b: dict[str, Tensor], base: dict[str, Tensor]
) -> dict[str, Tensor]:
    return {n: (a[n].float() + share * (b[n].float() - base[n].float())).half() for n in a}


def bake(
    share: float, a: dict[str, Tensor], lora: dict[str, Tensor], places: dict[str, list[str]]
) -> dict[str, Tensor]:
    """Add share · alpha / rank · up @ down. places: tensor → the LoRA's modules that change it, one after the other."""
    for name, modules in places.items():
        changes = []
        for module in modules:
            up, down = lora[f"{module}.lora_up.weight"].float(), lora[f"{module}.lora_down.weight"].float()
            scale = share * float(lora[f"{module}.alpha"]) / down.shape[0]
            changes.append(scale * (up.flatten(1) @ down.flatten(1)))
        a[name] = (a[name].float() + torch.cat(changes).reshape(a[name].shape)).half()
    return a


def main() -> None:
    job, share, out, *paths = sys.argv[1:]
    inputs: list[Any] = [load_file(path) for path in paths]
    if job == "bake":
        inputs.append(json.loads(Path(paths[1]).with_suffix(".json").read_bytes()))
    merge: Any = {"weighted_sum": weighted_sum, "add_difference": add_difference, "bake": bake}[job]
    save_file(merge(float(share), *inputs), out)


if __name__ == "__main__":
    main()
