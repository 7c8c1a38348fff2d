"""What a base makes of pictures shown smaller or closer, as Custom Diffusion shows them: `python -m benchmarks.views`.

Of the demo's flat base and drawings of the mascot: how well its VAE gives them back, and how far its U-Net is from the
noise in them when the caption says what is there. A U-Net that predicted nothing at all would be at 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from sdforge.families.sd15.load import load
from sdforge.run.diffusion import Diffusion
from sdforge.run.images import Picture, plan_pictures
from sdforge.run.views import PLACE, View, mask_of, pixels_of
from tests.families.workbench import take
from tests.run.order import dataset

ROOT = Path(__file__).parents[1] / "recipes"
MASCOT = "girl with purple twin tails"  # in words that the base knows
PICTURES = 6
TIMESTEPS = (150, 300, 500, 700, 900)
VIEWS = {
    "as it is": View((128, 128), (0, 0)),
    "moved by 8 pixels": View((128, 128), (-8, 0)),
    "zoomed to 136": View((136, 136), (0, 8)),
    "zoomed to 176": View((176, 176), (24, 32)),
    "shrunk to 112": View((112, 112), (-8, -8)),
    "shrunk to 48": View((48, 48), (-40, -40)),
}


def main() -> int:
    torch.set_num_threads(1)
    diffusion = load(take(ROOT / "bases" / "flat").given(), torch.device("cpu"), torch.float32)
    given = dataset(ROOT / "data" / "mascot", trigger=MASCOT)
    shown = plan_pictures(given.pictures, diffusion.resolution, buckets=True)[:PICTURES]
    print(f"| 128 × 128 pixels | VAE, dB | {' | '.join(f't = {t}' for t in TIMESTEPS)} |")
    print("| --- | --: |" + " --: |" * len(TIMESTEPS))
    for what, view in VIEWS.items():
        found = [_look(diffusion, picture, view, seed) for seed, picture in enumerate(shown)]
        level = sum(level for level, _ in found) / len(found)
        losses = torch.stack([losses_T for _, losses_T in found]).mean(0).tolist()
        print(f"| {what} | {level:.1f} | {' | '.join(f'{loss:.3f}' for loss in losses)} |", flush=True)
    return 0


@torch.no_grad()
def _look(diffusion: Diffusion, picture: Picture, view: View, seed: int) -> tuple[float, Tensor]:
    """Return the level in dB at which a view comes back, and the U-Net's mean square error at each timestep."""
    pixels_1CHW, mask_11HW = pixels_of(picture, view, flip=False), mask_of(picture, view, flip=False)
    clean_1CHW = diffusion.encode_picture(pixels_1CHW)
    apart_1CHW = diffusion.decode_picture(clean_1CHW).clamp(-1, 1) - pixels_1CHW
    error = _mean(apart_1CHW.square(), functional.interpolate(mask_11HW, scale_factor=PLACE))
    timesteps_T = torch.tensor(TIMESTEPS)
    clean_TCHW = clean_1CHW.expand(len(TIMESTEPS), -1, -1, -1)
    noise_TCHW = torch.randn(clean_TCHW.shape, generator=torch.Generator().manual_seed(seed))
    text = diffusion.encode_text([picture.caption] * len(TIMESTEPS))
    noisy_TCHW = diffusion.schedule.add_noise(clean_TCHW, noise_TCHW, timesteps_T)
    square_TCHW = (diffusion.predict(noisy_TCHW, timesteps_T, text) - noise_TCHW).square()
    return float(10 * torch.log10(4 / error)), _mean(square_TCHW, mask_11HW)


def _mean(square_BCHW: Tensor, mask_11HW: Tensor) -> Tensor:
    """Return every picture's mean over what counts."""
    weight_BCHW = mask_11HW.expand_as(square_BCHW)
    return (square_BCHW * weight_BCHW).sum((1, 2, 3)) / weight_BCHW.sum((1, 2, 3))


if __name__ == "__main__":
    sys.exit(main())
