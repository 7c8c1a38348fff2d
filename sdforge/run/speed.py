"""What makes a training fast on a CUDA device. On a CPU nothing is done: there the plain way is the fastest.

None of it changes what is learned, only how it is rounded; so it is part of the fingerprint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sdforge.run.diffusion import Diffusion

LONG = 300  # steps from which on compiling (a minute or two) pays


def tune(diffusion: Diffusion, trained: set[nn.Parameter], *, steps: int, shapes: int) -> list[str]:
    """Make a loaded checkpoint fast on its device; return what was done.

    trained: parameters that stay in fp32. steps: that will be run; shapes: how many shapes of latents there are.
    """
    if diffusion.device.type != "cuda":
        return []
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    done = ["tf32", lay_out(diffusion.unet)]
    if diffusion.precision is not torch.float32:
        networks = [diffusion.unet, *diffusion.text_encoders.values()]
        done.append(shrink(networks, trained, diffusion.precision))
    if steps >= LONG and shapes <= 8:
        done.append(compile_blocks(diffusion.unet))
    return [each for each in done if each]


def lay_out(network: nn.Module) -> str:
    """Lay convolutions out with channels last, as tensor cores want them."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return "channels_last"


def shrink(networks: list[nn.Module], trained: set[nn.Parameter], dtype: torch.dtype) -> str:
    """Keep the weights of matrices that are not trained in the type they are computed in, so that no step casts them.

    Norms keep fp32, in which autocast computes them; tables of tokens do, since rows may be learned behind them.
    """
    for network in networks:
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                for parameter in module.parameters(recurse=False):
                    if parameter not in trained and not parameter.requires_grad:
                        parameter.data = parameter.data.to(dtype)
    return f"frozen {str(dtype).removeprefix('torch.')}"


def compile_blocks(network: nn.Module) -> str:
    """Compile the blocks that repeat, which takes a tenth of the time that compiling all would."""
    compile_: Any = getattr(network, "compile_repeated_blocks", None)
    if compile_ is None:
        return ""
    compile_(dynamic=False)
    return "compiled"
