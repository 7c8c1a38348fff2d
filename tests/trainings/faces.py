"""A trained base of the demo and drawings of blue-haired faces: here the best row for a new word is known.

The new word stands where captions say `blue`, and begins as `red`; the row of `blue` is the oracle.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from demo.attributes import caption, draw_combinations
from demo.drawing import draw
from demo.palettes import FLAT
from sdforge.families.sd15.load import load
from sdforge.method import module_of
from sdforge.run.adapter import Adapter, Batch
from sdforge.run.diffusion import Diffusion
from sdforge.run.images import Picture, read_pixels
from tests.families.workbench import Taken, take
from tests.run.order import settings

BASE = Path(__file__).parents[2] / "recipes" / "bases" / "flat"
NOISY = 400  # first timestep: a colour is decided in much noise
WORD, INIT, ORACLE = "<x>", "red", "blue"


def flat() -> Taken:
    return take(BASE)


def loaded(base: Taken) -> Diffusion:
    return load(base.given(), torch.device("cpu"), torch.float32)


def latents(diffusion: Diffusion, picture: Image.Image, path: Path) -> Tensor:
    picture.save(path)
    return diffusion.encode_picture(read_pixels(Picture(str(path), "", "", picture.size), flip=False))


@dataclass
class Faces:
    """Four drawings to learn from, and six others, each in two fixed noises."""

    base: Taken
    diffusion: Diffusion
    shown_BCHW: Tensor
    captions: list[str]
    others: Batch

    @staticmethod
    def drawn(work: Path) -> Faces:
        base = flat()
        diffusion = loaded(base)
        found: list[tuple[Tensor, list[str]]] = []
        for seed, count in ((11, 4), (12, 6)):
            chosen = islice(draw_combinations(seed, held_out=False), count)
            faces = [replace(a, hair_colour=ORACLE, hair="long", accessory="none") for a in chosen]
            drawings = [draw(face, FLAT, 1000 * seed + i) for i, face in enumerate(faces)]
            encoded = [latents(diffusion, d, work / f"{seed}-{i}.png") for i, d in enumerate(drawings)]
            found.append((torch.cat(encoded), [caption(face) for face in faces]))
        (shown, captions), (others, said) = found
        draw_noise = torch.Generator().manual_seed(0)
        return Faces(
            base, diffusion, shown, captions, noised(diffusion, others.repeat(2, 1, 1, 1), said * 2, draw_noise)
        )

    def says(self, captions: list[str], word: str) -> list[str]:
        return [text.replace(f"{ORACLE} hair", f"{word} hair") for text in captions]

    @torch.no_grad()
    def loss(self, word: str, diffusion: Diffusion | None = None) -> float:
        """Return the loss on the others when their captions have this word."""
        return self._loss(self._said(word, diffusion or self.diffusion))

    @torch.no_grad()
    def guided_loss(self, word: str, negative: str, guidance: float, diffusion: Diffusion | None = None) -> float:
        """Return the loss of the guided prediction; negative: the word that stands on the other side, "" for none."""
        network = diffusion or self.diffusion
        prompts = self.says(self.others.captions, negative) if negative else [""] * len(self.others.captions)
        one = self.others
        away = network.predict(one.noisy_BCHW, one.timesteps_B, network.encode_text(prompts))
        return self._loss(away + guidance * (self._said(word, network) - away))

    def _said(self, word: str, diffusion: Diffusion) -> Tensor:
        prompts = self.says(self.others.captions, word)
        return diffusion.predict(self.others.noisy_BCHW, self.others.timesteps_B, diffusion.encode_text(prompts))

    def _loss(self, predicted_BCHW: Tensor) -> float:
        return float((predicted_BCHW - self.others.target_BCHW).square().mean())

    def learn(self, name: str, steps: int, batch: int, **changes: Any) -> tuple[Diffusion, Adapter]:
        """Train a method's rows as the loop does."""
        diffusion = loaded(self.base)
        table = module_of("trainings", name).TABLE
        wanted = table.model_construct(**settings(name, token=WORD, init=INIT, **changes))
        adapter: Adapter = module_of("trainings", f"{name}.adapter").begin(wanted, diffusion)
        groups = [{"params": list(g.parameters.values()), "lr": g.learning_rate} for g in adapter.groups()]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        trained: list[nn.Parameter] = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
        draw_noise = torch.Generator().manual_seed(1)
        for step in range(steps):
            chosen = torch.randperm(len(self.captions), generator=draw_noise)[:batch]
            captions = self.says([self.captions[i] for i in chosen.tolist()], WORD)
            one = noised(diffusion, self.shown_BCHW[chosen], captions, draw_noise)
            predicted = adapter.predict(one, diffusion.encode_text(captions))
            optimizer.zero_grad()
            (predicted - one.target_BCHW).square().mean().backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            adapter.stepped(step)
        return diffusion, adapter


def noised(diffusion: Diffusion, clean_BCHW: Tensor, captions: list[str], draw_noise: torch.Generator) -> Batch:
    noise = torch.randn(clean_BCHW.shape, generator=draw_noise)
    timesteps = torch.randint(NOISY, 1000, (len(clean_BCHW),), generator=draw_noise)
    schedule = diffusion.schedule
    noisy, target = (make(clean_BCHW, noise, timesteps) for make in (schedule.add_noise, schedule.target))
    return Batch(noisy, target, timesteps, captions)
