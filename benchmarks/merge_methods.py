"""What each merge costs: `python -m benchmarks.merge_methods`.

One tensor (two matrices of an SDXL feed-forward layer, or the shape that is asked for) of random numbers stands for a
base, and two copies with noise for what was fine-tuned from it. Each method makes it as the worker does: read from
files that the page cache holds, verified, computed, rounded, hashed and written. Reported is the CPU time (user and
system) per million elements, the least of several rounds in one process, its ratio to a weighted sum of two, the time
that passed, and the peak of anonymous memory in bytes per element beyond what the process held before.

`--device cuda:0` lets a GPU choose and rank for the merges that do so, and says if it does not.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import inspect
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from sdforge.method import method_groups, module_of
from sdforge.order import Computation, Order
from sdforge.ref import Ref
from sdforge.run.formula import run_formula

SETTINGS: dict[str, dict[str, Any]] = {  # beside the defaults
    "weighted_sum": {"weights": [0.7, 0.3]},
    "scale": {"weight": 0.7},
    "nearswap": {"t": 0.001},
    "adjust": {"detail_in": 2.0, "tensor": "unet.conv_in.weight"},
}
REFERENCE = "weighted_sum"
THREE = 3  # tensors at hand: a base and what was fine-tuned from it


def write_tensors(folder: Path, shape: tuple[int, ...]) -> list[Ref]:
    """Write a base and two fine-tuned tensors as fp16."""
    draw = np.random.default_rng(0)
    base = draw.standard_normal(shape, np.float32) * np.float32(0.05)
    found = []
    for i in range(THREE):
        tensor = base if i == 0 else base + draw.standard_normal(shape, np.float32) * np.float32(0.002)
        data = tensor.astype(np.float16).tobytes()
        path = folder / f"{i}.bin"
        path.write_bytes(data)
        found.append(Ref("x", "F16", shape, str(path), 0, xxhash.xxh3_128_hexdigest(data)))
    return found


def order(name: str, refs: list[Ref], shape: tuple[int, ...]) -> Computation:
    """Return the computation of a method with its defaults on as many tensors as it takes: two or three."""
    parameters = inspect.signature(getattr(module_of("merges", name), name)).parameters.values()
    named = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    several = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    count = 2 if name == REFERENCE else THREE if several else named
    return Computation("unet", "x", "F16", shape, name, SETTINGS.get(name, {}), tuple(refs[:count]))


def made(computation: Computation, device: str) -> None:
    """Make the tensor into a pack of its own, and throw it away."""
    with tempfile.TemporaryDirectory() as work:
        how = {"device": device}
        run_formula(Order("", "", computation.method, "merges", "sdxl", {}, work, compute=[computation], how=how), say)


def say(**event: Any) -> None:
    """Hear of progress, and pass on what is remarked."""
    if "remark" in event:
        print(event["remark"])


def peak_of(computation: Computation, device: str) -> int:
    """Return by how many bytes anonymous memory grew at most."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, and not counted as held before
    before = status("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is held now
    made(computation, device)
    return status("VmHWM") - before - (status("VmRSS") - status("RssAnon"))


def status(field: str) -> int:
    """Return a figure of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="what each merge costs")
    parser.add_argument("methods", nargs="*", help="default: all")
    parser.add_argument("--shape", type=int, nargs="+", default=[10240, 1280])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="what chooses and ranks")
    arguments = parser.parse_args()
    shape, names = tuple(arguments.shape), [n for n, group in method_groups().items() if group == "merges"]
    chosen = sorted({REFERENCE, *(arguments.methods or names)})
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    passed: dict[str, list[float]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as folder:
        refs = write_tensors(Path(folder), shape)
        orders = {name: order(name, refs, shape) for name in chosen}
        peaks = {name: peak_of(each, arguments.device) for name, each in orders.items()}
        for _ in range(arguments.rounds):
            for name, each in orders.items():
                start, began = time.process_time(), time.perf_counter()
                made(each, arguments.device)
                seconds[name].append(time.process_time() - start)
                passed[name].append(time.perf_counter() - began)
    size, reference = prod(shape), min(seconds[REFERENCE])
    print("| method | tensors | CPU ms per million | to weighted_sum | ms per million | peak bytes per element |")
    print("| --- | --: | --: | --: | --: | --: |")
    for name, least in sorted(((name, min(times)) for name, times in seconds.items()), key=lambda row: row[1]):
        row = f"{least / size * 1e9:.0f} | {least / reference:.1f} | {min(passed[name]) / size * 1e9:.0f}"
        row += f" | {peaks[name] / size:.1f}"
        print(f"| {name} | {len(orders[name].inputs)} | {row} |")


if __name__ == "__main__":
    main()
