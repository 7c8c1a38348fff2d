"""The search for empty prompts, one timestep after the other; between two of them it can stop and go on.

Shapes in names: B is 1, C channels, H W of latents, T timesteps, L tokens, D width of the text's hidden states.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdforge.dtypes import SAFETENSORS
from sdforge.errors import ActionFailed
from sdforge.order import Order, Outcome
from sdforge.run.ddim import DDIM, SPACING, guide, invert, predict_at
from sdforge.run.derived import Derived
from sdforge.run.diffusion import Conditioning, Diffusion, load_diffusion
from sdforge.run.fingerprint import fingerprint
from sdforge.run.images import Latents, plan_pictures
from sdforge.run.sketch import sketch
from sdforge.run.states import Stopped, Table, load_state, save_state
from sdforge.run.tensors import DTYPES, NAMES, raw, rounded, write_pack
from sdforge.trainings.null_text_inversion import TABLE

if TYPE_CHECKING:
    from sdforge.trainings.null_text_inversion import NullTextInversion

GAIN = 10.0  # dB above DDIM inversion, below which an inversion is hardly one (methods-embeddings §3.5)
SLACK = 2e-5  # by which the early stop is less strict at every further timestep (the authors' code)

Report = Callable[..., None]


def invert_picture(order: Order, report: Report, stopped: Callable[[], bool]) -> Outcome:
    """Return start latents and empty prompts of the order's picture."""
    settings = TABLE.model_construct(**order.settings)
    report(note="loading the checkpoint")
    diffusion = load_diffusion(order, order.the("on"), settings.precision)
    return _Inversion(order, settings, diffusion).run(report, stopped)


class _Found(NamedTuple):
    """Up to some timestep: the path of the inversion, the empty prompts, the latents that they lead to, the losses."""

    pivots: list[Tensor]  # from the picture to noise, (1, C, H, W) each
    uncond: list[Tensor]  # from much noise to little, (1, L, D) each
    latents_BCHW: Tensor
    losses: list[float]


class _Inversion:
    def __init__(self, order: Order, settings: NullTextInversion, diffusion: Diffusion) -> None:
        self.order, self.settings, self.diffusion = order, settings, diffusion
        self.ddim = DDIM(diffusion.schedule, settings.steps)
        self.dtype = DTYPES[SAFETENSORS[settings.dtype]]
        self.derived = Derived(order.derived)
        self.resolution = settings.resolution or diffusion.resolution
        with torch.no_grad():
            self.towards = diffusion.encode_text([settings.prompt])
            self.empty = diffusion.encode_negative([""])
        self.resumed: list[dict[str, Any]] = []

    def run(self, report: Report, stopped: Callable[[], bool]) -> Outcome:
        began = time.monotonic()
        found = self._resume(report) or self._begin(report)
        how = self.order.how.get("states", {})
        every, minutes = int(how.get("steps", 0)), float(how.get("minutes", 1.0))
        saved, timesteps = time.monotonic(), self.ddim.timesteps
        for i in range(len(found.uncond), len(timesteps)):
            if stopped():
                self._save(found)
                raise Stopped
            found = self._advance(found, i, timesteps[i])
            report(step=i + 1, steps=len(timesteps), loss=found.losses[-1])
            now = time.monotonic()
            if i + 1 < len(timesteps) and ((every and (i + 1) % every == 0) or now - saved >= 60 * minutes):
                self._save(found)
                report(state=i + 1)
                saved = now
        return self._outcome(found, self._levels(found, report), time.monotonic() - began)

    def _begin(self, report: Report) -> _Found:
        """Encode the picture and follow it into noise."""
        (picture,) = plan_pictures(self.order.the("image").pictures, self.resolution, buckets=True)
        latents = Latents(self.diffusion, self.order.the("on"), self.derived).of(picture, flip=False)
        report(note="following the picture into noise")
        pivots = invert(self.diffusion, latents.to(self.diffusion.device), self.towards, self.settings.steps)
        return _Found(pivots, [], self._kept("start", pivots[-1]), [])

    def _kept(self, name: str, tensor: Tensor) -> Tensor:
        """Return what will be left of a tensor once it is kept, so that what is drawn later is what was found."""
        return rounded(name, tensor.detach(), self.dtype).float().to(tensor.device)

    # -- a timestep ------------------------------------------------------------------------------------------------

    def _advance(self, found: _Found, i: int, timestep: int) -> _Found:
        """Find the empty prompt of a timestep, and take the step with it."""
        begin = found.uncond[-1] if found.uncond else self.empty.hidden_BLD
        if not self.settings.inner:  # negative-prompt inversion (Miyake et al. 2023, https://arxiv.org/abs/2305.16807)
            begin = self._kept("uncond", self.towards.hidden_BLD)
        uncond_BLD = nn.Parameter(begin.float().clone())
        rate = self.settings.learning_rate * (1 - i / (2 * self.settings.steps))
        optimizer = torch.optim.Adam([uncond_BLD], rate)
        pivot_BCHW = found.pivots[-2 - i]
        good_enough = self.settings.early_stop + i * SLACK
        with torch.no_grad():
            towards_BCHW = predict_at(self.diffusion, found.latents_BCHW, timestep, self.towards)
        for left in reversed(range(self.settings.inner + 1)):
            with torch.set_grad_enabled(left > 0):
                # rounded as it will be kept; its gradient is passed on to the exact value
                value_BLD = uncond_BLD + (self._kept("uncond", uncond_BLD) - uncond_BLD).detach()
                away = Conditioning(value_BLD, self.empty.added)
                away_BCHW = predict_at(self.diffusion, found.latents_BCHW, timestep, away)
                guided_BCHW = away_BCHW + self.settings.guidance * (towards_BCHW - away_BCHW)
                nearer_BCHW = self.ddim.step(found.latents_BCHW, guided_BCHW, timestep)
                loss = functional.mse_loss(nearer_BCHW, pivot_BCHW)
            if not math.isfinite(float(loss.detach())):
                raise ActionFailed(
                    f"the loss became {float(loss.detach())} at timestep {timestep}", hint="a smaller learning_rate"
                )
            if not left or float(loss.detach()) < good_enough:
                break
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        losses = [*found.losses, float(loss.detach())]
        return _Found(found.pivots, [*found.uncond, value_BLD.detach()], nearer_BCHW.detach(), losses)

    # -- states ----------------------------------------------------------------------------------------------------

    def _save(self, found: _Found) -> None:
        if not self.order.states:
            return
        tensors = {"pivots": torch.cat(found.pivots), "latents": found.latents_BCHW}
        if found.uncond:
            tensors["uncond"] = torch.cat(found.uncond)
        table: Table = {name: (NAMES[t.dtype], tuple(t.shape), raw(t)) for name, t in tensors.items()}
        notes = {"losses": found.losses, "fingerprint": fingerprint(self.diffusion.device), "resumed": self.resumed}
        save_state(Path(self.order.states), len(found.uncond), table, notes)

    def _resume(self, report: Report) -> _Found | None:
        state = load_state(Path(self.order.states), self.settings.steps) if self.order.states else None
        if state is None:
            return None
        tensors = {
            name: torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).reshape(shape).to(self.diffusion.device)
            for name, (dtype, shape, data) in state.tensors.items()
        }
        here, there = fingerprint(self.diffusion.device), state.notes["fingerprint"]
        self.resumed = [
            *state.notes["resumed"],
            {"step": state.step, **({} if here == there else {"fingerprint": there})},
        ]
        report(resumed=state.step, same=here == there)
        uncond = list(tensors["uncond"][:, None]) if "uncond" in tensors else []
        return _Found(list(tensors["pivots"][:, None]), uncond, tensors["latents"], list(state.notes["losses"]))

    # -- the end ---------------------------------------------------------------------------------------------------

    def _levels(self, found: _Found, report: Report) -> list[float]:
        """Return how near the picture comes back in dB, with the plain empty prompt and with those that were found."""
        away = [self.empty] * len(found.uncond)
        plain_BCHW = guide(self.diffusion, found.pivots[-1], self.towards, away, self.settings.guidance)
        levels = [level(found.pivots[0], latents_BCHW) for latents_BCHW in (plain_BCHW, found.latents_BCHW)]
        report(remark=remark(*levels))
        return levels

    def _outcome(self, found: _Found, levels: list[float], seconds: float) -> Outcome:
        uncond_TLD = torch.cat(found.uncond)
        made = {"start": found.pivots[-1], "uncond": uncond_TLD}
        tensors = {name: rounded(name, tensor.cpu(), self.dtype) for name, tensor in made.items()}
        outcome = write_pack(Path(self.order.work), {"null_text": tensors})
        moved_TLD = uncond_TLD - self.empty.hidden_BLD
        lines, norm = sketch([("uncond", moved_TLD.flatten(0, 1), None)])
        outcome.facts = {
            "prompt": self.settings.prompt,
            "guidance": self.settings.guidance,
            "steps": self.settings.steps,
            "resolution": self.resolution,
            "spacing": SPACING,
        }
        outcome.grade = "B"
        outcome.fingerprint = fingerprint(self.diffusion.device)
        outcome.record = {
            "losses": found.losses,
            "levels": [round(decibels, 2) for decibels in levels],
            "remark": remark(*levels),
            "seconds": round(seconds, 3),
            "steps": self.settings.steps,
            "sketch": lines,
            "norm": norm,
            "resumed": self.resumed,
            "derived": {"reused": dict(self.derived.reused), "made": dict(self.derived.made)},
        }
        return outcome


def level(wanted_BCHW: Tensor, found_BCHW: Tensor) -> float:
    """Return the peak signal-to-noise ratio of latents in dB; the peak is the range of those that are wanted."""
    error = (found_BCHW - wanted_BCHW).square().mean().clamp_min(1e-12)
    return float(10 * torch.log10((wanted_BCHW.max() - wanted_BCHW.min()).square() / error))


def remark(plain: float, found: float) -> str:
    """Say how near a picture comes back, in dB, with the plain empty prompt and with those that were found."""
    gain = found - plain
    text = f"the picture comes back at {found:.1f} dB, {gain:.1f} above DDIM inversion with the same guidance"
    if gain >= GAIN:
        return text
    return f"{text}: less than {GAIN:g}, which a larger learning_rate, more `inner` updates or more steps change"
