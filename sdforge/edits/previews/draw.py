"""Draw pictures with several checkpoints, one column each: same prompts, same seeds, same noise."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdforge.order import Given, Order, Outcome
from sdforge.run.diffusion import Diffusion
from sdforge.run.fingerprint import fingerprint
from sdforge.run.sample import Wish, sample

BATCH = 8  # pictures at a time
SAMPLER = "DPM++ 2M"


def draw(order: Order, report: Callable[..., None]) -> Outcome:
    """Return the pictures as files `COLUMN/PROMPT-SEED.png`; COLUMN begins with the digest of its checkpoint."""
    settings, device = order.settings, torch.device(order.how["device"])
    inputs = [order.the("checkpoint"), *order.inputs.get("beside", [])]
    columns = {given.identity: given for given in inputs}.values()  # a preset that changes nothing is its base
    cells = [(p, seed) for p in range(len(settings["prompts"])) for seed in settings["seeds"]]
    outcome = Outcome(grade="B", fingerprint=fingerprint(device))
    load = importlib.import_module(f"sdforge.families.{order.family}.load").load
    done, total = 0, len(cells) * len(columns)
    for given in columns:
        diffusion = load(given, device, torch.float32)
        for start in range(0, len(cells), BATCH):
            part = cells[start : start + BATCH]
            _draw_some(order, given, diffusion, part, outcome)
            done += len(part)
            report(step=done, steps=total)
    return outcome


def _draw_some(order: Order, given: Given, diffusion: Diffusion, cells: list[Any], outcome: Outcome) -> None:
    settings = order.settings
    wishes = [
        Wish(
            settings["prompts"][p],
            settings["negative_prompt"],
            seed,
            settings["steps"],
            settings["guidance"],
            settings["resolution"] or diffusion.resolution,
            settings["clip_skip"],
        )
        for p, seed in cells
    ]
    for (p, seed), wish, pixels_CHW in zip(cells, wishes, sample(diffusion, wishes), strict=True):
        name = f"{given.identity[:16]}/{p + 1}-{seed}.png"
        path = Path(order.work) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, pixels_CHW, wish)
        data = path.read_bytes()
        outcome.files[name] = [hashlib.sha256(data).hexdigest(), len(data)]


def save_png(path: Path, pixels_CHW: torch.Tensor, wish: Wish) -> None:
    """Write a picture (−1 … 1) with the parameters it was drawn with, as A1111 writes them."""
    values = ((pixels_CHW.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    negative = f"\nNegative prompt: {wish.negative_prompt}" if wish.negative_prompt else ""
    skip = f", Clip skip: {wish.clip_skip + 1}" if wish.clip_skip else ""
    info = PngInfo()
    info.add_text(
        "parameters",
        f"{wish.prompt}{negative}\nSteps: {wish.steps}, Sampler: {SAMPLER}, CFG scale: {wish.guidance:g}, "
        f"Seed: {wish.seed}, Size: {wish.resolution}x{wish.resolution}{skip}",
    )
    Image.fromarray(np.ascontiguousarray(values)).save(path, pnginfo=info)
