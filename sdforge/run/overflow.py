"""What a VAE says while it draws: numbers that fp16 cannot hold, and pictures that are none.

Stable Diffusion XL's own VAE is the known case: it draws in fp32 and bf16, but in fp16 its activations pass 65504 and
the picture is black. Here pictures are drawn in fp32, so that the trap shows only in the sizes of activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from sdforge.errors import ActionFailed

LARGEST = torch.finfo(torch.float16).max  # 65504
STEP = 1 / 127.5  # of pixels in −1 … 1, between two values of a byte
OTHER_VAE = "take a VAE from another checkpoint: [swap.NAME] with `vae = …`"


@dataclass
class Peak:
    """The largest magnitude that a network's modules gave out, and where.

    broken: the first module that gave NaN or Inf; told: whether it was given such already.
    """

    largest: float = 0.0
    where: str = ""
    broken: str = ""
    told: bool = False

    def see(self, name: str, given: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if self.broken or not isinstance(value, Tensor):
            return
        magnitude = float(value.detach().abs().max())
        if not isfinite(magnitude):
            tensors = [each for each in given if isinstance(each, Tensor)]
            self.broken, self.told = name, not all(bool(torch.isfinite(each).all()) for each in tensors)
        elif magnitude > self.largest:
            self.largest, self.where = magnitude, name


@contextmanager
def watched(network: nn.Module) -> Iterator[Peak]:
    """Watch every module of a network meanwhile, sums within blocks included."""
    peak = Peak()

    def watch(name: str) -> Any:
        return lambda _, given, output: peak.see(name, given, output)

    hooks = [module.register_forward_hook(watch(name)) for name, module in network.named_modules() if name]
    try:
        yield peak
    finally:
        for hook in hooks:
            hook.remove()


def refuse_none(pixels_CHW: Tensor, peak: Peak, prompt: str, *, one_colour: bool = True) -> None:
    """Refuse a picture of NaN or of nothing but black. Raises ActionFailed, which says where it began.

    one_colour: whether a picture all of whose pixels are equal is one.
    """
    if not bool(torch.isfinite(pixels_CHW).all()):
        if peak.told:
            hint = "are the U-Net's and the text encoders' weights whole, and is `prediction` stated rightly?"
            raise ActionFailed(f"what the U-Net draws for {prompt!r} holds NaN or Inf", hint=hint)
        raise ActionFailed(f"the VAE's {peak.broken} makes NaN or Inf of {prompt!r}", hint=OTHER_VAE)
    if float(pixels_CHW.max()) <= -1:
        raise ActionFailed(f"the picture of {prompt!r} is black all over", hint=OTHER_VAE)
    if not one_colour and float((pixels_CHW.amax((1, 2)) - pixels_CHW.amin((1, 2))).max()) < STEP:
        hint = f'{OTHER_VAE}; [preset.previews] one_colour = "allow" where that is what was asked for'
        raise ActionFailed(f"the picture of {prompt!r} is of one colour all over", hint=hint)


def warning_of(peak: Peak, dtype: str) -> list[list[str]]:
    """Return [what fp16 cannot hold, a way out] for a VAE that is kept in it, or nothing.

    dtype: of the VAE, as safetensors writes it.
    """
    if dtype != "F16" or peak.largest <= LARGEST:
        return []
    what = f"the VAE's {peak.where} reaches {peak.largest:.3g}, and fp16 ends at {LARGEST:g}"
    mended = "[swap.NAME] with `vae = …` of a VAE mended for fp16"
    wider = '[cast.NAME] with `vae = "fp32"` for programs that keep types'
    return [[f"{what}: programs that decode in fp16 draw black pictures with it", f"{mended}, or {wider}"]]
