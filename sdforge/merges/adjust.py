"""Detail, contrast and colours of what a checkpoint draws: its first and last layers are scaled and shifted."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from sdforge.exact import fraction
from sdforge.settings import Weight

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2


FACTORS = {  # tensor → setting, and what one of it adds to a factor of 1
    "unet.conv_in.weight": ("detail_in", Fraction(-1, 100)),
    "unet.conv_in.bias": ("detail_in", Fraction(2, 100)),
    "unet.conv_norm_out.weight": ("detail_out", Fraction(-1, 100)),
    "unet.conv_norm_out.bias": ("detail_out", Fraction(2, 100)),
    "unet.conv_out.weight": ("detail_out2", Fraction(-1, 100)),
}
SHIFTED = "unet.conv_out.bias"
STEP = Fraction(2, 100)  # what one of a colour adds to a channel of the latent
COLORS = ("brightness", "cyan_red", "magenta_green", "yellow_blue")
THIRD = Fraction(1, 3)
# latent space → what each colour is in the second to fourth channel; the first is contrast
CHANNELS: dict[str, tuple[tuple[Fraction | int, ...], ...]] = {
    "sd": ((-1, THIRD, 2 * THIRD), (1, 1, 0), (0, -1, -1), (1, 0, 1)),
    "sdxl": ((0, 0, 1), (1, 0, 0), (-1, -1, 0), (-1, 1, 0)),
}


def adjust(
    a: Tensor,
    *,
    detail_in: Weight = 0.0,
    detail_out: Weight = 0.0,
    detail_out2: Weight = 0.0,
    contrast: Weight = 0.0,
    brightness: Weight = 0.0,
    cyan_red: Weight = 0.0,
    magenta_green: Weight = 0.0,
    yellow_blue: Weight = 0.0,
    latents: str = "sd",
    tensor: str = "",
) -> Tensor:
    """Return a with the weights of conv_in, conv_norm_out and conv_out times 1 − d/100, biases times 1 + d/50.

    The bias of conv_out is shifted by 1/50 of contrast and colours instead. All others pass through.
    a: a checkpoint. detail_in, detail_out, detail_out2: of the three layers, usually −10 … 10: more is more detail, and
    more noise. contrast, brightness, cyan_red, magenta_green, yellow_blue: usually −10 … 10.
    What a colour is in the latents' channels is the family's: one for SD 1 and 2, another one for SDXL.
    Source: "Adjust" of SuperMerger, whose list IN, OUT, OUT2, Contrast, Brightness, COL1, COL2, COL3 these are.
    """
    given = {"detail_in": detail_in, "detail_out": detail_out, "detail_out2": detail_out2}
    if tensor in FACTORS:
        name, each = FACTORS[tensor]
        return a * float(1 + each * fraction(given[name]))
    if tensor != SHIFTED:
        return a.clone()
    colors = [fraction(color) for color in (brightness, cyan_red, magenta_green, yellow_blue)]
    rows = CHANNELS[latents]
    shifts = [sum((color * row[i] for color, row in zip(colors, rows, strict=True)), Fraction(0)) for i in range(3)]
    return a + a.new_tensor([float(STEP * shift) for shift in (fraction(contrast), *shifts)])


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """Six tensors are changed, each by its own settings; where those are 0 it passes through."""
    tensor = parameters["tensor"]
    names = [FACTORS[tensor][0]] if tensor in FACTORS else ["contrast", *COLORS] if tensor == SHIFTED else []
    own = {name: parameters[name] for name in names if parameters[name]}
    if not own:
        return inputs[0]
    where = {"tensor": tensor} | ({"latents": parameters["latents"]} if own.keys() & set(COLORS) else {})
    return inputs, own | where
