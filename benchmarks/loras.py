"""Extracting and resizing LoRAs at full size: `python -m benchmarks.loras`. Prints the tables of RESULTS.md.

Stable Diffusion 1.5's U-Net in its true shapes with random weights, and the same with a random update of rank 16 in
every matrix and convolution, both fp16 (1.7 GB each). Each job is an order that one fresh worker runs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sdforge.families import family
from sdforge.order import Given, Order
from sdforge.ref import Ref
from sdforge.run.low_rank import of_matrix, of_product
from sdforge.run.tensors import write_pack

FAMILY, TRUE_RANK = family("sd15"), 16
RANKS = {"dtype": "fp16", "conv_rank": None, "energy": 1.0, "threshold": 0.0, "relative_threshold": 0.0}
RANK = 64  # of what is decomposed alone
MATRICES = {
    "attention 1280 × 1280": (1280, 1280),
    "feed-forward 10240 × 1280": (10240, 1280),
    "convolution 1280 × 11520": (1280, 11520),
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the U-Net's tensors: name → shape."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(cross_attention_dim=768)
    return {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}


def write(folder: Path, *, tuned: bool) -> Given:
    """Write the U-Net; tuned: with its update."""
    folder.mkdir()
    draw, tensors = torch.Generator().manual_seed(0), {}
    for name, shape in shapes().items():
        tensor = 0.02 * torch.randn(shape, generator=draw)
        own = torch.Generator().manual_seed(len(name) * 1000 + shape[0])
        if tuned and f"unet.{name.removesuffix('.weight')}" in FAMILY.modules() and name.endswith(".weight"):
            up, down = (torch.randn(*size, generator=own) for size in ((shape[0], TRUE_RANK), (TRUE_RANK, shape[1])))
            update = 2e-3 * up @ down
            tensor = tensor + update.reshape(*update.shape, *[1] * (len(shape) - 2))
        tensors[name] = tensor.half()
    outcome = write_pack(folder, {"unet": tensors})
    return _given("checkpoint", folder / outcome.pack, outcome.components)


def _given(kind: str, path: Path, components: dict[str, list[list[Any]]]) -> Given:
    refs = {c: [Ref(n, d, tuple(s), str(path), o, x) for n, d, s, _, x, o in rows] for c, rows in components.items()}
    return Given(kind, components=refs)


def run(folder: Path, method: str, inputs: dict[str, list[Given]], **settings: Any) -> tuple[dict[str, Any], Any]:
    """Run an order in a worker; return wall and CPU seconds and its peak memory, and the outcome."""
    folder.mkdir()
    how = {"device": "cpu", "threads": 2}
    order = Order("", "", method, "edits", "sd15", RANKS | settings, str(folder), inputs, how=how)
    (folder / "order.json").write_text(json.dumps(order.to_json()))
    began = time.perf_counter()
    command = [sys.executable, __file__, "--order", str(folder / "order.json")]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    measured, outcome = json.loads(said)
    return measured | {"wall": time.perf_counter() - began}, outcome


def run_here(path: Path) -> None:
    """Run one order in this process, and print what it took as the last line."""
    from sdforge.run.__main__ import run as run_order

    order = Order.from_json(json.loads(path.read_bytes()))
    outcome = run_order(order, _tell, lambda: False)
    used = resource.getrusage(resource.RUSAGE_SELF)
    measured = {"cpu": used.ru_utime + used.ru_stime, "gb": used.ru_maxrss / 2**20}
    print(json.dumps([measured, outcome.__dict__]))


def _tell(step: int = 0, steps: int = 0, **_: Any) -> None:
    """Say how far a job is: it takes minutes."""
    if step % 20 == 0 and steps:
        print(f"{step} of {steps} modules", file=sys.stderr, flush=True)


def jobs(work: Path) -> None:
    """Print what extracting and resizing a whole U-Net take."""
    tuned, base = write(work / "tuned", tuned=True), write(work / "base", tuned=False)
    print("| job, SD1.5's U-Net | modules | left out | wall s | CPU s | peak GB |")
    print("| --- | --: | --: | --: | --: | --: |")
    more = {"components": [], "biases": False, "rank": 32}
    took, made = run(work / "extract", "extract", {"tuned": [tuned], "base": [base]}, **more)
    _row("extract rank 32", took, made)
    lora = _given("lora", work / "extract" / made["pack"], made["components"])
    took, made = run(work / "resize", "resize", {"lora": [lora]}, rank=TRUE_RANK)
    _row("resize 32 to 16", took, made)


def _row(name: str, took: dict[str, Any], made: dict[str, Any]) -> None:
    modules = len(made["components"]["lora"]) // 2
    left = made["record"]["residual"]
    print(
        f"| {name} | {modules} | {left:.2%} | {took['wall']:.0f} | {took['cpu']:.0f} | {took['gb']:.1f} |", flush=True
    )


def ways() -> None:
    """Print what one module takes by the factors, by the Gram matrix of the product, and by its full decomposition."""
    print(f"\n| rank {RANK} | factors ms | Gram matrix ms | full decomposition ms |\n| --- | --: | --: | --: |")
    for name, (rows, columns) in MATRICES.items():
        draw = torch.Generator().manual_seed(0)
        up = torch.randn(rows, RANK, generator=draw, dtype=torch.float64)
        down = torch.randn(RANK, columns, generator=draw, dtype=torch.float64)
        product = up @ down
        times = [
            _least(partial(of_product, up, down)),
            _least(partial(of_matrix, product)),
            _least(partial(torch.linalg.svd, product, full_matrices=False)),
        ]
        print(f"| {name} | {' | '.join(f'{1000 * each:.0f}' for each in times)} |", flush=True)


def _least(work: Any, runs: int = 3) -> float:
    """Return the least CPU seconds of some runs."""
    found = []
    for _ in range(runs):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loras")
    parser.add_argument("--order", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.order:
        run_here(arguments.order)
        return
    with tempfile.TemporaryDirectory() as folder:
        jobs(Path(folder))
    torch.set_num_threads(2)
    ways()


if __name__ == "__main__":
    main()
