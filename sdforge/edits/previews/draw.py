"""Draw pictures with several checkpoints, one column each: same prompts, same seeds, same noise."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sdforge.artifact import SIDECARS, WITH
from sdforge.formats.own import own_names
from sdforge.formats.tokenizer import READ
from sdforge.formula import common_dtype
from sdforge.order import Given, Order, Outcome
from sdforge.run.diffusion import Diffusion, load_diffusion
from sdforge.run.fingerprint import fingerprint
from sdforge.run.overflow import Peak, refuse_none, warning_of, watched
from sdforge.run.sample import Wish, sample
from sdforge.run.tensors import load_component
from sdforge.sampler import SAMPLER

BATCH = 8  # pictures at a time
SHOWN = 60  # letters of a prompt that is spoken of

Report = Callable[..., None]


def draw(order: Order, report: Report) -> Outcome:
    """Return the pictures as files `COLUMN/PROMPT-SEED.png`; COLUMN begins with the digest of its checkpoint.

    Behind it stands `-with` where sidecars take part. Of a sidecar with pictures of its own they are called
    `SIDECAR-PROMPT.png`, PROMPT 0 being its own.
    """
    return _Drawing(order, report).run()


class _Drawing:
    def __init__(self, order: Order, report: Report) -> None:
        self.order, self.report, self.settings = order, report, order.settings
        self.outcome = Outcome(grade="B", fingerprint=fingerprint(torch.device(order.how["device"])))
        self.cells = [(p, seed) for p in range(len(self.settings["prompts"])) for seed in self.settings["seeds"]]
        self.sidecars = [_Sidecar(given) for given in order.inputs.get("sidecars", [])]
        self.sidecars.sort(key=lambda sidecar: (SIDECARS.index(sidecar.given.kind), sidecar.given.identity))
        self.peak = Peak()
        self.done = self.total = 0

    def run(self) -> Outcome:
        preset = self.order.the("checkpoint")
        inputs = [preset, *self.order.inputs.get("beside", [])]
        columns = {given.identity: given for given in inputs}.values()  # a preset that changes nothing is its base
        attached = any(sidecar.attached for sidecar in self.sidecars)
        worded = bool(self.order.architecture.text_encoders)  # else without a picture there is nothing to draw
        self.outcome.facts["column"] = preset.identity  # whose pictures are the preset's
        self.total = len(self.cells) * (worded * len(columns) + attached)
        self.total += sum(2 * (1 + len(self.settings["prompts"])) for sidecar in self.sidecars if sidecar.replayed)
        for given in columns:
            diffusion, column = load_diffusion(self.order, given), given.identity[:16]
            with watched(diffusion.vae) as self.peak:
                if worded:
                    self._draw_cells(column, diffusion)
                if given.identity == preset.identity and self.sidecars:
                    self._draw_sidecars(column, diffusion, attached=attached)
            if given.identity == preset.identity:
                told = self._told_of_vae(common_dtype(ref.dtype for ref in given.components["vae"]))
                self._warn([*told, *(self._cut(diffusion) if worded else [])])
        return self.outcome

    def _told_of_vae(self, dtype: str) -> list[list[str]]:
        """Say of the preset's VAE what other programs may stumble over."""
        self.outcome.record["vae_peak"] = [self.peak.largest, self.peak.where]
        return warning_of(self.peak, dtype)

    def _cut(self, diffusion: Diffusion) -> list[list[str]]:
        """Say of which prompts the end is not read, as words of many vectors make them longer than they look."""
        prompts = dict.fromkeys([*self.settings["prompts"], self.settings["negative_prompt"]])
        cut = [prompt for prompt in prompts if diffusion.words.is_cut(prompt)]
        what = f"is longer than the {READ} tokens that are read: its end counts for nothing here"
        hint = (
            "shorten it: programs that read the rest apart draw otherwise; a word of several vectors is as many tokens"
        )
        return [[f"the prompt {prompt[:SHOWN]!r}{'…' * (len(prompt) > SHOWN)} {what}", hint] for prompt in cut]

    def _warn(self, found: list[list[str]]) -> None:
        """Keep what is to be said of the pictures. found: [what, a way out]."""
        if found:
            self.outcome.record["warnings"] = found
        for each in found:
            print(*each, sep="\n  ")

    def _draw_sidecars(self, column: str, diffusion: Diffusion, *, attached: bool) -> None:
        replayed = [sidecar for sidecar in self.sidecars if sidecar.replayed]
        for sidecar in replayed:
            self._draw_replays(column, sidecar, diffusion, found=False)
        with ExitStack() as stack:
            for sidecar in self.sidecars:
                stack.enter_context(sidecar.on(diffusion))
            if attached:
                self._draw_cells(column + WITH, diffusion)
            for sidecar in replayed:
                self._draw_replays(column + WITH, sidecar, diffusion, found=True)

    def _draw_cells(self, column: str, diffusion: Diffusion) -> None:
        settings = self.settings
        for start in range(0, len(self.cells), BATCH):
            part = self.cells[start : start + BATCH]
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
                for p, seed in part
            ]
            for (p, seed), wish, pixels_CHW in zip(part, wishes, sample(diffusion, wishes), strict=True):
                self._keep(f"{column}/{p + 1}-{seed}.png", pixels_CHW, wish)
            self.report(step=self.done, steps=self.total)

    def _draw_replays(self, column: str, sidecar: _Sidecar, diffusion: Diffusion, *, found: bool) -> None:
        """Draw a sidecar's own picture, and what every prompt makes of it; found: with what was found of it."""
        module, facts = sidecar.replayed, sidecar.given.facts
        assert module is not None
        tensors = sidecar.tensors if found else module.plain(diffusion, sidecar.tensors)
        for p, prompt in enumerate([None, *self.settings["prompts"]]):
            says = facts["prompt"] if prompt is None else prompt
            wish = Wish(says, "", 0, facts["steps"], facts["guidance"], facts["resolution"])
            (pixels_CHW,) = module.replay(diffusion, tensors, facts, prompt)
            self._keep(f"{column}/{sidecar.given.identity[:16]}-{p}.png", pixels_CHW, wish, sampler="DDIM")
            self.report(step=self.done, steps=self.total)

    def _keep(self, name: str, pixels_CHW: Tensor, wish: Wish, sampler: str = SAMPLER) -> None:
        allowed = self.settings.get("one_colour") == "allow"
        refuse_none(pixels_CHW, self.peak, wish.prompt, one_colour=allowed)
        path = Path(self.order.work) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, pixels_CHW, wish, sampler)
        data = path.read_bytes()
        self.outcome.files[name] = [hashlib.sha256(data).hexdigest(), len(data)]
        self.done += 1


class _Sidecar:
    """A sidecar with its tensors and the module of its kind."""

    def __init__(self, given: Given) -> None:
        kinds = importlib.import_module("sdforge.sidecars")
        self.given = given
        self.tensors: dict[str, Tensor] = own_names({c: load_component(refs) for c, refs in given.components.items()})
        self.attached, self.replayed = kinds.attached(given.kind), kinds.replayed(given.kind)

    @contextmanager
    def on(self, diffusion: Diffusion) -> Iterator[None]:
        """Let a checkpoint draw with it meanwhile."""
        take_off = self.attached.attach(diffusion, self.tensors, self.given.facts) if self.attached else None
        try:
            yield
        finally:
            if take_off:
                take_off()


def save_png(path: Path, pixels_CHW: Tensor, wish: Wish, sampler: str = SAMPLER) -> None:
    """Write a picture (−1 … 1) with the parameters it was drawn with, as A1111 writes them."""
    values = ((pixels_CHW.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    negative = f"\nNegative prompt: {wish.negative_prompt}" if wish.negative_prompt else ""
    skip = f", Clip skip: {wish.clip_skip + 1}" if wish.clip_skip else ""
    info = PngInfo()
    info.add_text(
        "parameters",
        f"{wish.prompt}{negative}\nSteps: {wish.steps}, Sampler: {sampler}, CFG scale: {wish.guidance:g}, "
        f"Seed: {wish.seed}, Size: {values.shape[1]}x{values.shape[0]}{skip}",
    )
    Image.fromarray(np.ascontiguousarray(values)).save(path, pnginfo=info)
