"""How fast trainings run: `python -m benchmarks.train [--device cuda] [--preserve]`.

On a CPU: seconds of a step of the shared loop against those of a loop written by hand (`benchmarks/plain_loop.py`)
on the same cached latents, in turns in one run; both must have the same losses, bit for bit. On CUDA: pictures per
second of a LoRA on U-Nets of full size with random weights, and the share of the device's peak. With --preserve: what
a step costs that also keeps the class as it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
BASE, DATA = ROOT / "recipes" / "bases" / "flat", ROOT / "recipes" / "data" / "sketches"
SETTINGS: dict[str, Any] = {"rank": 8, "batch": 4, "schedule": "constant", "warmup": 0, "caption_dropout": 0.0}
BOUND = 1.1  # of the ratio
# forward and backward of a LoRA step for one picture, in FLOP (methods-weights, table of costs), and peaks in FLOP/s
COSTS = {"sd15": 1.61e12, "sdxl": 13.5e12}
PEAKS = {"H100": 790e12, "H200": 790e12}


def ours(
    work: Path, steps: int, device: str, clock: Callable[[], float] = time.perf_counter, **more: Any
) -> tuple[list[float], list[float]]:
    """Return (losses, seconds of each step but the first) of the shared loop; more: settings of the LoRA."""
    from sdforge.run.train import run_training
    from tests.families.workbench import take
    from tests.run.order import dataset, order

    wanted = order(work, "lora", take(BASE), dataset(DATA), **SETTINGS, **more, steps=steps, how={"device": device})
    wanted = dataclasses.replace(wanted, derived=str(work.parent / "derived"))
    stamps: list[float] = []

    def asked() -> bool:
        stamps.append(clock())  # before every step
        return False

    outcome = run_training(wanted, lambda **_: None, asked)
    return outcome.record["losses"], [b - a for a, b in itertools.pairwise(stamps)]


def by_hand(steps: int, device: str) -> tuple[list[float], list[float]]:
    """Return the same of the loop written by hand, which gets our latents and texts."""
    from benchmarks.plain_loop import train
    from sdforge.families.sd15.load import load
    from sdforge.run.images import plan_pictures, read_pixels
    from tests.families.workbench import take
    from tests.run.order import SEED, dataset

    diffusion = load(take(BASE).given(), torch.device(device), torch.float32)
    pictures = plan_pictures(dataset(DATA).pictures, diffusion.resolution, buckets=True)
    latents = [diffusion.encode_picture(read_pixels(p, flip=False)).cpu() for p in pictures]
    with torch.no_grad():
        texts = [diffusion.encode_text([p.caption]).hidden_BLD.cpu() for p in pictures]
    return train(str(BASE), latents, texts, SETTINGS | {"seed": SEED, "steps": steps}, device)


def compare(steps: int, rounds: int, device: str) -> int:
    """Run both in turns; print medians and their ratio; return the exit code."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            a, b = by_hand(steps, device), ours(Path(folder) / str(turn), steps, device)
            if a[0] != b[0]:
                first = next(i for i, pair in enumerate(zip(*(a[0], b[0]), strict=True)) if pair[0] != pair[1])
                print(f"the losses differ from step {first + 1} on: {a[0][first]} by hand, {b[0][first]} here")
                return 1
            plain, loop = (statistics.median(seconds[3:]) for seconds in (a[1], b[1]))
            ratios.append(loop / plain)
            print(f"| {turn + 1} | {1000 * plain:.1f} | {1000 * loop:.1f} | {ratios[-1]:.3f} |")
    ratio = statistics.median(ratios)
    print(f"\nThe losses of {steps} steps are the same bits. Median of the ratios: {ratio:.3f} (bound {BOUND}).")
    return int(ratio > BOUND)


def preserve(steps: int, rounds: int, device: str) -> int:
    """Print milliseconds of a step without and with `preserve`, whose trigger every caption names.

    On a CPU of this thread's work, so that whoever else is at work there counts less.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            found = [
                statistics.median(ours(Path(folder) / f"{turn}-{i}", steps, device, clock, **more)[1][3:])
                for i, more in enumerate(({}, {"trigger": "background", "preserve": "wall"}))
            ]
            print(f"| {turn + 1} | {1000 * found[0]:.1f} | {1000 * found[1]:.1f} | {found[1] / found[0]:.2f} |")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preserve", action="store_true")
    parser.add_argument("--shape", default="*", help="of which full sizes, as a pattern: 'SD1.5*'")
    parser.add_argument("--ways", nargs="+", default=["short", "long"], help="of training, on CUDA")
    wishes = parser.parse_args()
    torch.set_num_threads(1)
    if wishes.preserve:
        print("| round | plain, ms a step | with preserve, ms a step | ratio |\n| --: | --: | --: | --: |")
        return preserve(wishes.steps, wishes.rounds, wishes.device)
    if wishes.device.startswith("cuda"):
        from benchmarks.train_full_size import FULL, measure
        from sdforge.run.__main__ import prepare

        prepare(wishes.device, threads=1)
        shapes = {name: shape for name, shape in FULL.items() if fnmatch(name, wishes.shape)}
        measure(torch.device(wishes.device), COSTS, PEAKS, shapes, wishes.steps, wishes.ways)
        return 0
    print("| round | by hand, ms a step | sdforge, ms a step | ratio |\n| --: | --: | --: | --: |")
    return compare(wishes.steps, wishes.rounds, wishes.device)


if __name__ == "__main__":
    sys.exit(main())
