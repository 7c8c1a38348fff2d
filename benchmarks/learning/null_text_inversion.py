"""Null-text inversion: drawings that the base has never seen come back under guidance, and their hair can be dyed.

Measured in latents, against DDIM inversion with the plain empty prompt, and against negative-prompt inversion (the
prompt itself on both sides), which searches for nothing. It took 42 minutes of half a core; with `--work` what was
inverted before is reused.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from benchmarks.learning.bench import SEEDS, Bench, Finding
from demo.attributes import Attributes, caption, draw_combinations
from demo.classifier import classify
from demo.drawing import draw
from demo.palettes import FLAT

if TYPE_CHECKING:
    from torch import Tensor

    from sdforge.run.diffusion import Diffusion

COUNT = 22  # drawings for each of the seeds that choose them: the inversion itself draws no random number
DYE = "blue"
TARGET = """
[source.face-{i}]
from = "recipes/data/{folder}/{i}.png"
[null_text_inversion.back-{i}]
on = "flat"
image = "face-{i}"
prompt = "{prompt}"
steps = 20
inner = 8
learning_rate = 0.1
"""


class Inverted(NamedTuple):
    """A drawing with what was found for it."""

    path: Path
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def measure(bench: Bench) -> list[Finding]:
    """Return levels in decibels, and what an edit shows."""
    import torch

    torch.set_num_threads(1)
    levels: dict[str, list[float]] = {"ddim": [], "prompt": [], "found": [], "others": []}
    hair: dict[str, list[float]] = {"drawing": [], "again": [], "dyed": []}
    for seed in SEEDS:
        faces = chosen(seed)
        diffusion, found = inverted(bench, faces, seed)
        for i, (face, one) in enumerate(zip(faces, found, strict=True)):
            for name, uncond in empty_prompts(diffusion, face, one, found[i - 1]).items():
                levels[name].append(level(diffusion, one, uncond))
            wish = caption(replace(face, hair_colour=DYE))
            shown = (Image.open(one.path), drawn(diffusion, one, None), drawn(diffusion, one, wish))
            for name, picture in zip(hair, shown, strict=True):
                hair[name].append(float(classify(picture).hair_colour == DYE))
    ddim, prompt, own, others = (tuple(values) for values in levels.values())
    before, again, dyed = (tuple(values) for values in hair.values())
    gain = mean(own) - mean(ddim)
    return [
        Finding("dB, DDIM inversion → null-text", ddim, own, bound=f"≥ 10 dB more ({gain:.1f})", kept=gain >= 10),
        Finding("dB, negative-prompt inversion → null-text", prompt, own, bound="more", kept=mean(own) > mean(prompt)),
        Finding("dB, DDIM inversion → another drawing's", ddim, others, bound="less", kept=mean(others) < mean(ddim)),
        Finding(f"hair is {DYE}, the same prompt → {DYE} hair", again, dyed),
        Finding(f"hair is {DYE}, the drawing → the same prompt", before, again, control=True),
    ]


def chosen(seed: int) -> list[Attributes]:
    """Return faces of combinations that the base was not taught, none of whose hair has the dye's colour."""
    others = (face for face in draw_combinations(21 + seed, held_out=True) if face.hair_colour != DYE)
    return list(islice(others, COUNT))


def empty_prompts(diffusion: Diffusion, face: Attributes, one: Inverted, other: Inverted) -> dict[str, Tensor]:
    """Return what stands against the prompt at every step (T, L, D): nothing searched for, its own, another one's."""
    import torch

    with torch.no_grad():
        plain, prompt = (diffusion.encode_text([text]).hidden_BLD for text in ("", caption(face)))
    found = one.tensors["uncond"]
    return {
        "ddim": plain.expand_as(found),
        "prompt": prompt.expand_as(found),
        "found": found,
        "others": other.tensors["uncond"],
    }


def mean(numbers: tuple[float, ...]) -> float:
    return sum(numbers) / len(numbers)


def inverted(bench: Bench, faces: list[Attributes], seed: int) -> tuple[Diffusion, list[Inverted]]:
    """Build an inversion of every face; return the base and what the store has of them."""
    import torch

    from sdforge.orders import make_order
    from sdforge.run.tensors import load
    from sdforge.session import open_session

    name = f"inverted-{seed}"
    folder = bench.folder / "recipes" / "data" / name
    folder.mkdir(parents=True, exist_ok=True)
    for i, face in enumerate(faces):
        draw(face, FLAT, 5_000_000 + COUNT * seed + i).save(folder / f"{i}.png")
    text = "".join(TARGET.format(folder=name, i=i, prompt=caption(face)) for i, face in enumerate(faces))
    bench.build(name, f'family = "sd15"\n{text}')
    session = open_session(bench.folder)
    plan = session.plan(session.resolve([name]))
    found = []
    for i in range(len(faces)):
        artifact = plan.steps[f"{name}:back-{i}"].artifact
        assert artifact is not None
        rows = session.store.table(artifact.components["null_text"])
        given = {row.name: row for row in rows}
        found.append(
            Inverted(folder / f"{i}.png", {n: load(_ref(session, row)) for n, row in given.items()}, artifact.facts)
        )
    step = plan.steps[f"{name}:back-0"]
    order = make_order(session, step, step.key, step.manifest, bench.folder, {})
    loading = importlib.import_module(f"sdforge.families.{order.family}.load")
    return loading.load(order.the("on"), torch.device("cpu"), torch.float32), found


def _ref(session: Any, row: Any) -> Any:
    from sdforge.ref import Ref

    return Ref(row.name, row.dtype, row.shape, str(session.find(row.spot.file)), row.spot.offset, row.xxh3)


def level(diffusion: Diffusion, one: Inverted, uncond_TLD: Tensor) -> float:
    """Return how near the latents come back that a drawing has, in dB."""
    from sdforge.run.images import Picture, read_pixels
    from sdforge.sidecars.null_text import replay_latents
    from sdforge.trainings.null_text_inversion.adapter import level as decibels

    clean = diffusion.encode_picture(read_pixels(Picture(str(one.path), "", "", (128, 128)), flip=False))
    back = replay_latents(diffusion, one.tensors | {"uncond": uncond_TLD}, one.facts)
    return decibels(clean, back)


def drawn(diffusion: Diffusion, one: Inverted, prompt: str | None) -> Image.Image:
    """Return what a prompt makes of the drawing."""
    from sdforge.sidecars.null_text import replay

    pixels_BCHW = replay(diffusion, one.tensors, one.facts, prompt)
    values = ((pixels_BCHW[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(values.numpy())
