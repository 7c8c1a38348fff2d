"""What makes a training fast on a CUDA device. On a CPU nothing is done: there the plain way is the fastest.

None of it changes what is learned, only how it is rounded; so it is part of the fingerprint. Elsewhere AdamW is fused
(`optimizers`), a step's batch is made ready while the device still computes the one before (`train`), and networks
attend by `scaled_dot_product_attention`, as diffusers and transformers do by themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sdforge.run.diffusion import Diffusion

LONG = 300  # steps from which on compiling (a minute or two) pays
MOST_SHAPES = 8  # for each of which code is compiled
GRAPHS = "CUDA graphs"


def tune(diffusion: Diffusion, trained: set[nn.Parameter], *, steps: int, shapes: int, static: bool) -> list[str]:
    """Make a loaded checkpoint fast on its device; return what was done.

    trained: parameters that stay in fp32. steps: that will be run; shapes: how many shapes of latents there are;
    static: whether every step is computed in one piece and with the same shapes, apart from those of latents.
    """
    if diffusion.device.type != "cuda":
        return []
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    done = ["tf32", lay_out(diffusion.unet)]
    if diffusion.precision is not torch.float32:
        networks = [diffusion.unet, *diffusion.text_encoders.values()]
        done.append(shrink(networks, trained, diffusion.precision))
    return done + compiled(diffusion.unet, steps=steps, shapes=shapes, static=static)


def compiled(network: nn.Module, *, steps: int, shapes: int, static: bool) -> list[str]:
    """Compile a network where the steps pay for it, from graphs where they can be; return what was done."""
    if steps < LONG or shapes > MOST_SHAPES:
        return []
    return compile_blocks(network, graphs=static and shapes == 1)


def begin_step(tuned: list[str]) -> None:
    """Say that a step begins: what graphs computed in the one before may be written over."""
    if GRAPHS in tuned:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


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


def compile_blocks(network: nn.Module, *, graphs: bool) -> list[str]:
    """Compile the blocks that repeat, which takes a tenth of the time that compiling all would; return what was done.

    graphs: record what they launch as CUDA graphs and play those, which takes one launch instead of hundreds. A graph
    has the shapes that it was recorded with.
    """
    compile_: Any = getattr(network, "compile_repeated_blocks", None)
    if compile_ is None:
        return []
    compile_(dynamic=False, mode="reduce-overhead" if graphs else "default")
    return ["compiled", GRAPHS] if graphs else ["compiled"]
