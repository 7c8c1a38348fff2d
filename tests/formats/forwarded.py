"""LoRA files that LyCORIS writes, and what its modules make of numbers: `python forwarded.py JOB`, where LyCORIS is.

A job is {"weights": a file of weights by modules' names, "forms": name → [class, its arguments], "out": folder}. Every
module is made by LyCORIS around a layer with its weight, with random parameters; NAME.safetensors is its file,
NAME.outputs what the layers then answer to `numbers`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def layer(weight: Tensor) -> nn.Module:
    """Return a layer with this weight and no bias."""
    out, into, *kernel = weight.shape
    made: Any = nn.Conv2d(into, out, kernel, padding=kernel[0] // 2, bias=False) if kernel else None
    made = made or nn.Linear(into, out, bias=False)
    made.weight.data.copy_(weight)
    return made  # type: ignore[no-any-return]


def numbers(weight: Tensor) -> Tensor:
    """Return what a layer with this weight is given."""
    size = (2, weight.shape[1], 5, 5) if weight.dim() == 4 else (3, weight.shape[1])
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def main(job: dict[str, Any]) -> None:
    import lycoris.modules

    weights = load_file(job["weights"])
    for name, (kind, arguments) in job["forms"].items():
        torch.manual_seed(1)
        tensors, outputs = {}, {}
        for place, weight in weights.items():
            original = layer(weight)
            module = getattr(lycoris.modules, kind)(place, original, 1.0, **arguments)
            for parameter in module.parameters():
                parameter.data += 0.2 * torch.randn(parameter.shape)
            module.apply_to()
            module.eval()
            tensors |= {key: t.detach().contiguous() for key, t in module.state_dict(prefix=f"{place}.").items()}
            with torch.no_grad():
                outputs[place] = original(numbers(weight)).contiguous()
        save_file(tensors, f"{job['out']}/{name}.safetensors")
        save_file(outputs, f"{job['out']}/{name}.outputs")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
