"""Draw a data set, in batches that are the same however often the drawing stops and goes on."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sdforge.edits.previews.draw import save_png
from sdforge.order import Order, Outcome
from sdforge.run.diffusion import Diffusion, load_diffusion
from sdforge.run.fingerprint import fingerprint
from sdforge.run.memory import RESERVE, held_bytes, kept_bytes
from sdforge.run.sample import Wish, sample
from sdforge.run.seeds import generator
from sdforge.run.states import Stopped, sweep
from sdforge.store.files import make_folder, publish, sha256_of

BATCH = 8  # pictures at a time: part of what they are, since sums of other batches round in other places


def draw(order: Order, report: Callable[..., None], stopped: Callable[[], bool]) -> Outcome:
    """Return the pictures as files `N.png` and as a data set. Raises Stopped between batches."""
    began, settings = time.monotonic(), order.settings
    kept = Path(order.states or order.work)
    make_folder(kept)
    count, diffusion, at_once = settings["count"], None, BATCH
    sweep(kept)
    done = _kept(kept)
    if done:
        report(resumed=len(done), same=True)
    for start in range(0, count, BATCH):
        numbers = range(start, min(start + BATCH, count))
        if all(number in done for number in numbers):
            continue
        if stopped():
            raise Stopped
        if diffusion is None:
            report(note="loading the checkpoint")
            diffusion = load_diffusion(order, order.the("on"), settings["precision"])
            at_once = _fitting(order, diffusion, report)
        done |= _draw_some(order, diffusion, numbers, kept, at_once)
        report(step=numbers[-1] + 1, steps=count)
    parts: dict[str, Any] = {} if at_once >= BATCH else {"micro_batch": at_once}  # other sums round in other places
    outcome = Outcome(grade="B", fingerprint=fingerprint(torch.device(order.how["device"])) | parts)
    rows = []
    for number in range(count):
        path = Path(order.work) / f"{number + 1}.png"
        done[number].replace(path)
        sha256 = sha256_of(path)
        outcome.files[path.name] = [sha256, path.stat().st_size]
        rows.append([sha256, _prompt(order, number), 1])
    outcome.facts = {"pictures": sorted(rows)}
    outcome.record = {"pictures": count, "seconds": round(time.monotonic() - began, 3)}
    return outcome


def _fitting(order: Order, diffusion: Diffusion, report: Callable[..., None]) -> int:
    """Return how many pictures of a batch are computed at once, to stay within the bytes that there are; at least one.

    What a backward pass would keep of a prediction is more than drawing needs, and the same on every device.
    """
    budget = int(order.how.get("vram", 0))
    if not budget:
        return BATCH
    networks = [diffusion.unet, *diffusion.text_encoders.values(), diffusion.vae]
    weights = [tensor for network in networks for tensor in network.state_dict(keep_vars=True).values()]
    edge = (order.settings["resolution"] or diffusion.resolution) // 8
    sides = 1 if order.settings["guidance"] == 1 else 2
    noise_BCHW = torch.zeros(sides, 4, edge, edge, device=diffusion.device, requires_grad=True)
    with torch.no_grad():
        condition = diffusion.encode_text([""] * sides)
    timesteps_B = torch.zeros(sides, device=diffusion.device, dtype=torch.long)
    each = kept_bytes(lambda: diffusion.predict(noise_BCHW, timesteps_B, condition).sum(), weights)
    most = max(1, min(BATCH, (int(budget * (1 - RESERVE)) - held_bytes(weights)) // each))
    said = f"{most} picture{'s' * (most > 1)} at once"
    report(note=f"for {budget / 1e9:.3g} GB: {said}", fits=said)
    return most


def _kept(folder: Path) -> dict[int, Path]:
    """Return number → file of the pictures that were drawn before; their names say what their bytes are."""
    found = {}
    for path in folder.glob("*-*.png"):
        number, _, sha256 = path.stem.partition("-")
        if number.isdigit() and sha256_of(path) == sha256:
            found[int(number)] = path
    return found


def _prompt(order: Order, number: int) -> str:
    prompts = order.settings["prompts"] or [order.settings["prompt"]]
    prompt: str = prompts[number % len(prompts)]
    return prompt


def _draw_some(order: Order, diffusion: Diffusion, numbers: range, kept: Path, at_once: int) -> dict[int, Path]:
    """Draw a batch, so many pictures at once, and publish its pictures."""
    settings = order.settings
    wishes = [
        Wish(
            _prompt(order, number),
            settings["negative_prompt"],
            int(torch.randint(1 << 32, (1,), generator=generator(settings["seed"], "class image", number))),
            settings["steps"],
            settings["guidance"],
            settings["resolution"] or diffusion.resolution,
            settings["clip_skip"],
        )
        for number in numbers
    ]
    found = {}
    drawn = chain.from_iterable(sample(diffusion, wishes[i : i + at_once]) for i in range(0, len(wishes), at_once))
    for number, wish, pixels_CHW in zip(numbers, wishes, drawn, strict=True):
        with TemporaryDirectory(dir=kept, prefix=".tmp-") as folder:
            path = Path(folder) / "picture.png"
            save_png(path, pixels_CHW, wish)
            found[number] = kept / f"{number}-{hashlib.sha256(path.read_bytes()).hexdigest()}.png"
            publish(path, found[number])
    return found
