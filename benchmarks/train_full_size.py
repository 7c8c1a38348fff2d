"""LoRA trainings on checkpoints of full size with random weights, for a CUDA device: pictures per second.

Called by `python -m benchmarks.train --device cuda`. Pictures are noise; their latents and texts are cached, as in a
long training; the median of the times between steps of the shared loop counts. Each is run as short trainings are,
and as long ones, whose blocks are compiled and played from CUDA graphs.
"""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from PIL import Image

from benchmarks.networks import BIG_G, UNETS, VIT_L
from sdforge.run import speed

ROOT = Path(__file__).parents[1] / "recipes" / "bases" / "flat"  # whose VAE, tokenizer and schedule serve
STEPS = 40
WAYS = {"short": sys.maxsize, "long": 1}  # from how many steps on blocks are compiled


class Shape(NamedTuple):
    """A checkpoint's U-Net and text encoders, as their libraries configure them; an edge in pixels, and batches."""

    family: str
    pipeline: str
    unet: dict[str, Any]
    texts: tuple[dict[str, Any], ...]
    edge: int
    batches: tuple[int, ...]


FULL = {
    "SD1.5 at 512": Shape(
        "sd15", "StableDiffusionPipeline", {"sample_size": 64} | UNETS["sd15"], (VIT_L,), 512, (8, 32)
    ),
    "SDXL at 1024": Shape(
        "sdxl", "StableDiffusionXLPipeline", {"sample_size": 128} | UNETS["sdxl"], (VIT_L, BIG_G), 1024, (4, 8)
    ),
}


def write_base(folder: Path, shape: Shape) -> None:
    """Write a checkpoint of this shape with random weights, fp16."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    for part in ("vae", "scheduler"):
        shutil.copytree(ROOT / part, folder / part)
    words = len(json.loads((ROOT / "tokenizer" / "vocab.json").read_text()))
    index = json.loads((ROOT / "model_index.json").read_text()) | {"_class_name": shape.pipeline}
    torch.manual_seed(0)
    networks: dict[str, Any] = {"unet": UNet2DConditionModel(**shape.unet)}
    for suffix, sizes in zip(("", "_2"), shape.texts, strict=False):
        kind: Any = CLIPTextModelWithProjection if suffix else CLIPTextModel
        ends = {"bos_token_id": words - 2, "eos_token_id": words - 1}
        networks[f"text_encoder{suffix}"] = kind(CLIPTextConfig(vocab_size=words, **ends, **sizes))
        shutil.copytree(ROOT / "tokenizer", folder / f"tokenizer{suffix}")
        index |= {f"text_encoder{suffix}": ["transformers", kind.__name__]}
        index |= {f"tokenizer{suffix}": ["transformers", "CLIPTokenizer"]}
    for name, network in networks.items():
        network.half().save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps(index))


def measure(
    device: torch.device,
    costs: Mapping[str, float],
    peaks: Mapping[str, float],
    shapes: Mapping[str, Shape] = FULL,
    steps: int = STEPS,
    ways: Sequence[str] = ("short",),
) -> None:
    """Print a row for every shape, way and batch: pictures per second, share of the peak, memory.

    costs: family → FLOP of a picture at its shape of full size; peaks: part of a device's name → FLOP per second;
    ways: of `WAYS`.
    """
    name = torch.cuda.get_device_properties(device).name if device.type == "cuda" else device.type
    peak = next((value for key, value in peaks.items() if key in name), None)
    print(f"\n{name}, torch {torch.__version__}\n\n| LoRA, rank 16 | batch | pictures/s | of the peak | GB | as |")
    print("| --- | --: | --: | --: | --: | --- |")
    for what, shape in shapes.items():
        with tempfile.TemporaryDirectory() as place:
            with device:  # where random numbers are drawn faster
                write_base(Path(place) / "base", shape)
            (Path(place) / "data").mkdir()
            for i in range(4):
                noise = Image.effect_noise((shape.edge, shape.edge), 60).convert("RGB")
                noise.save(Path(place) / "data" / f"{i}.png")
                (Path(place) / "data" / f"{i}.txt").write_text(f"a drawing, number {i}")
            for way, batch in itertools.product(ways, shape.batches):
                with mock.patch.object(speed, "LONG", WAYS[way]):
                    rate, memory = pace(Path(place), shape.edge, batch, device, steps)
                share = f"{rate * costs[shape.family] / peak:.0%}" if peak else "unknown"
                print(f"| {what} | {batch} | {rate:.1f} | {share} | {memory} | {way} |", flush=True)


def pace(place: Path, edge: int, batch: int, device: torch.device, steps: int) -> tuple[float, str]:
    """Train on the checkpoint and the pictures of a folder; return pictures per second and gigabytes of the device."""
    from sdforge.run.train import run_training
    from tests.families.workbench import take
    from tests.run.order import dataset, order

    settings = {"rank": 16, "batch": batch, "precision": "bf16", "steps": steps, "resolution": edge}
    how = {"device": str(device)}
    work, on, pictures = place / f"w{batch}-{speed.LONG}", take(place / "base"), dataset(place / "data")
    wanted = order(work, "lora", on, pictures, **settings, how=how)
    stamps: list[float] = []
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)

    def asked() -> bool:
        if cuda:
            torch.cuda.synchronize(device)
        stamps.append(time.perf_counter())  # before every step
        return False

    run_training(wanted, lambda **_: None, asked)
    spent = statistics.median(b - a for a, b in itertools.pairwise(stamps))
    return batch / spent, f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f}" if cuda else "–"
