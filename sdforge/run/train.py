"""The one training loop. Methods differ in what is trained, what the loss is and what is saved: see `Adapter`.

A step depends on (seed, step), the trained numbers and the optimiser's state alone, so a training that stops and goes
on ends with the same bits as one that does not, on the same fingerprint.
"""

from __future__ import annotations

import importlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdforge.dtypes import SAFETENSORS
from sdforge.errors import ActionFailed
from sdforge.identity import H
from sdforge.method import module_of
from sdforge.order import Given, Outcome
from sdforge.order import Order as WorkOrder
from sdforge.run.derived import Derived
from sdforge.run.diffusion import Conditioning, Diffusion
from sdforge.run.fingerprint import fingerprint
from sdforge.run.images import Latents, Order, describe, plan_pictures, split
from sdforge.run.noise import STEPS
from sdforge.run.seeds import generator
from sdforge.run.sketch import sketch
from sdforge.run.states import State, Stopped, load_state, save_state
from sdforge.run.tensors import DTYPES, NAMES, raw, rounded, write_pack
from sdforge.trainings import Training

Report = Callable[..., None]
REPORT_EVERY = 0.2  # seconds
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Batch:
    """What one step learns from. Shapes: B pictures, C channels, H W of latents."""

    noisy_BCHW: Tensor
    target_BCHW: Tensor
    timesteps_B: Tensor
    captions: list[str]


@dataclass
class Group:
    """Parameters that share a learning rate and weight decay."""

    parameters: dict[str, nn.Parameter]
    learning_rate: float
    weight_decay: float


@dataclass
class Learned:
    """What a training saves: tensors of the artifact's one component, its facts, and its update for the sketch."""

    component: str
    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    update: list[tuple[str, Tensor, Tensor | None]] = field(default_factory=list)


class Adapter(ABC):
    """What is particular to a training method. Made by `begin(settings, diffusion)` of its `adapter` module."""

    diffusion: Diffusion
    text_is_frozen: bool = True  # then what captions say is encoded once

    @abstractmethod
    def groups(self) -> list[Group]:
        """Return the parameters that are trained."""

    @abstractmethod
    def learned(self) -> Learned:
        """Return what has been learned so far."""

    def predict(self, batch: Batch, condition: Conditioning) -> Tensor:
        """Return the prediction (B, C, H, W) that the loss compares with the target."""
        return self.diffusion.predict(batch.noisy_BCHW, batch.timesteps_B, condition)


def run_training(order: WorkOrder, report: Report, stopped: Callable[[], bool]) -> Outcome:
    """Run a training to its end. Raises Stopped (the state is kept) or ActionFailed (NaN, unusable pictures)."""
    device = torch.device(order.how.get("device", "cpu"))
    adapter_module = module_of(order.group, f"{order.method}.adapter")
    table: type[Training] = module_of(order.group, order.method).TABLE
    settings = table.model_construct(**order.settings)
    on = order.the("on")
    report(note="loading the checkpoint")
    load = importlib.import_module(f"sdforge.families.{order.family}.load").load
    diffusion: Diffusion = load(on, device, PRECISIONS[settings.precision])
    adapter: Adapter = adapter_module.begin(settings, diffusion)
    training = _Training(order, settings, diffusion, adapter, on)
    return training.run(report, stopped)


class _Training:
    def __init__(self, order: WorkOrder, settings: Training, diffusion: Diffusion, adapter: Adapter, on: Given) -> None:
        self.order, self.settings, self.diffusion, self.adapter = order, settings, diffusion, adapter
        self.seed = int(order.settings["seed"])
        self.derived = Derived(order.derived)
        given = order.the("dataset")
        learned, _ = split(given)
        resolution = settings.resolution or diffusion.resolution
        self.pictures = plan_pictures(learned, resolution, buckets=settings.buckets)
        self.latents = Latents(diffusion, on, self.derived)
        self.batches = Order(
            self.pictures, settings.batch, self.seed, flip=settings.flip, dropout=settings.caption_dropout
        )
        self.texts = _Texts(diffusion, on, self.derived) if adapter.text_is_frozen else None
        self.groups = adapter.groups()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(g.parameters.values()), "lr": g.learning_rate, "weight_decay": g.weight_decay}
                for g in self.groups
            ],
            betas=(0.9, 0.999),
            eps=1e-8,
            fused=True,
        )
        self.losses: list[float] = []
        self.resumed: list[dict[str, Any]] = []

    def run(self, report: Report, stopped: Callable[[], bool]) -> Outcome:
        began = time.monotonic()
        self._prepare(report)
        step = self._resume(report)
        how = self.order.how.get("states", {})
        every, minutes = int(how.get("steps", 0)), float(how.get("minutes", 1.0))
        saved, last = time.monotonic(), 0.0
        steps = self.settings.steps
        while step < steps:
            if stopped():
                self._save(step)
                raise Stopped
            loss = self._step(step)
            step += 1
            self.losses.append(loss)
            now = time.monotonic()
            if now - last >= REPORT_EVERY or step == steps:
                report(step=step, steps=steps, loss=loss)
                last = now
            if step < steps and ((every and step % every == 0) or now - saved >= 60 * minutes):
                self._save(step)
                report(state=step)
                saved = time.monotonic()
        return self._outcome(time.monotonic() - began)

    def _prepare(self, report: Report) -> None:
        """Encode what every step would encode again; whatever fails, fails before hours are spent."""
        with torch.no_grad():
            for i, picture in enumerate(dict.fromkeys(self.pictures)):
                for flip in (False, True) if self.settings.flip else (False,):
                    self.latents.of(picture, flip=flip)
                report(note=f"encoding pictures {i + 1}/{len(set(self.pictures))}")
            if self.texts:
                self.texts.of(sorted({"", *(p.caption for p in self.pictures)}))
        report(
            derived={"reused": dict(self.derived.reused), "made": dict(self.derived.made)},
            buckets=describe(self.pictures),
        )

    def _step(self, step: int) -> float:
        batch = self._batch(step)
        for group, own in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = own.learning_rate * pace(self.settings, step)
        condition = self.texts.of(batch.captions) if self.texts else self.diffusion.encode_text(batch.captions)
        predicted = self.adapter.predict(batch, condition.to(self.diffusion.device))
        loss_B = (predicted - batch.target_BCHW).square().mean((1, 2, 3))
        weight_B = self.diffusion.schedule.min_snr_weight(batch.timesteps_B, self.settings.min_snr)
        loss = (loss_B * weight_B).mean()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ActionFailed(
                f"the loss became {value} at step {step + 1}", hint='a smaller learning_rate, or precision = "fp32"'
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.settings.clip:
            nn.utils.clip_grad_norm_([p for g in self.groups for p in g.parameters.values()], self.settings.clip)
        self.optimizer.step()
        return value

    def _batch(self, step: int) -> Batch:
        chosen, device = self.batches.at(step), self.diffusion.device
        pairs = zip(chosen.pictures, chosen.flips, strict=True)
        latents = torch.cat([self.latents.of(picture, flip=flip) for picture, flip in pairs])
        draw = generator(self.seed, "noise", step)
        noise = torch.randn(latents.shape, generator=draw)
        timesteps = torch.randint(self.settings.noise_from, STEPS, (len(chosen.captions),), generator=draw)
        latents, noise, timesteps = latents.to(device), noise.to(device), timesteps.to(device)
        schedule = self.diffusion.schedule
        return Batch(
            schedule.add_noise(latents, noise, timesteps),
            schedule.target(latents, noise, timesteps),
            timesteps,
            chosen.captions,
        )

    # -- states ----------------------------------------------------------------------------------------------------

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for i, group in enumerate(self.groups):
            for name in sorted(group.parameters):
                yield f"{i}.{name}", group.parameters[name]

    def _save(self, step: int) -> None:
        tensors: dict[str, tuple[str, tuple[int, ...], bytes | memoryview]] = {}
        for name, parameter in self._named():
            rows = {"value": parameter, **self.optimizer.state.get(parameter, {})}
            for part, tensor in rows.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise ActionFailed(f"{name} became NaN or Inf before step {step}", hint="a smaller learning_rate")
                tensors[f"{name}.{part}"] = (NAMES[tensor.dtype], tuple(tensor.shape), raw(tensor))
        notes = {"losses": self.losses, "fingerprint": fingerprint(self.diffusion.device), "resumed": self.resumed}
        save_state(Path(self.order.states), step, tensors, notes)

    def _resume(self, report: Report) -> int:
        state = load_state(Path(self.order.states), self.settings.steps) if self.order.states else None
        if state is None:
            return 0
        with torch.no_grad():
            for name, parameter in self._named():
                self._restore(name, parameter, state)
        self.losses = list(state.notes["losses"])
        here, there = fingerprint(self.diffusion.device), state.notes["fingerprint"]
        self.resumed = [
            *state.notes["resumed"],
            {"step": state.step, **({} if here == there else {"fingerprint": there})},
        ]
        report(resumed=state.step, same=here == there)
        return state.step

    def _restore(self, name: str, parameter: nn.Parameter, state: State) -> None:
        rows = {}
        for part in ("value", "step", "exp_avg", "exp_avg_sq"):
            if f"{name}.{part}" in state.tensors:
                dtype, shape, data = state.tensors[f"{name}.{part}"]
                tensor = torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).reshape(shape)
                rows[part] = tensor.to(parameter.device)
        parameter.copy_(rows.pop("value"))
        if rows:
            self.optimizer.state[parameter] = rows

    # -- the end ---------------------------------------------------------------------------------------------------

    def _outcome(self, seconds: float) -> Outcome:
        learned = self.adapter.learned()
        dtype = DTYPES[SAFETENSORS[self.settings.dtype]]
        tensors = {name: rounded(name, tensor.detach().cpu(), dtype) for name, tensor in learned.tensors.items()}
        outcome = write_pack(Path(self.order.work), {learned.component: tensors})
        lines, norm = sketch(learned.update)
        outcome.facts = learned.facts
        outcome.grade = "B"
        outcome.fingerprint = fingerprint(self.diffusion.device)
        outcome.record = {
            "losses": self.losses,
            "seconds": round(seconds, 3),
            "steps": self.settings.steps,
            "sketch": lines,
            "norm": norm,
            "resumed": self.resumed,
            "derived": {"reused": dict(self.derived.reused), "made": dict(self.derived.made)},
        }
        return outcome


def pace(settings: Training, step: int) -> float:
    """Return the share of the learning rate at a step: rising over the warm-up, then constant or falling to 2 %."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return 1.0
    start = max(settings.warmup, settings.steps // 2)
    if step < start:
        return 1.0
    share = (step - start) / max(1, settings.steps - start)
    return 0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2


class _Texts:
    """What captions say, encoded once each and kept in the store."""

    def __init__(self, diffusion: Diffusion, given: Given, derived: Derived) -> None:
        self.diffusion, self.derived = diffusion, derived
        owners = diffusion.family.owners
        parts = {name: i for name, i in given.identities.items() if name.startswith(("text_encoder", "tokenizer"))}
        facts = {name: value for name, value in given.facts.items() if owners.get(name) == "text_encoder"}
        self._from = {"components": parts, "facts": facts, "precision": str(diffusion.precision)}
        self._kept: dict[str, Conditioning] = {}

    def of(self, captions: list[str]) -> Conditioning:
        for caption in captions:
            if caption not in self._kept:
                name = H("text", {**self._from, "caption": caption})  # type: ignore[dict-item]
                tensors = self.derived.get("texts", name, lambda caption=caption: self._encode(caption))  # type: ignore[misc]
                added = {key: value for key, value in tensors.items() if key != "hidden"}
                self._kept[caption] = Conditioning(tensors["hidden"], added)
        return Conditioning.stack([self._kept[caption] for caption in captions])

    @torch.no_grad()
    def _encode(self, caption: str) -> dict[str, Tensor]:
        condition = self.diffusion.encode_text([caption])
        return {"hidden": condition.hidden_BLD.float(), **condition.added}
