"""The one training loop. Methods differ in what is trained, what the loss is and what is saved: see `Adapter`.

A step depends on (seed, step), the trained numbers and the optimiser's state alone, so a training that stops and goes
on ends with the same bits as one that does not, on the same fingerprint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdforge.dtypes import SAFETENSORS
from sdforge.errors import ActionFailed
from sdforge.formats.tokenizer import READ
from sdforge.identity import H
from sdforge.method import module_of
from sdforge.order import Given, Outcome
from sdforge.order import Order as WorkOrder
from sdforge.run.adapter import Adapter, Batch, joined
from sdforge.run.derived import Derived
from sdforge.run.diffusion import Conditioning, Diffusion, load_diffusion
from sdforge.run.fingerprint import fingerprint
from sdforge.run.images import Latents, Picture, describe, plan_pictures, read_mask, read_pixels, split
from sdforge.run.memory import choose, held_bytes, kept_bytes, set_checkpointing
from sdforge.run.optimizers import Average, make_optimizer, set_training
from sdforge.run.resume import put_back, taken_down
from sdforge.run.shown import Batches, Shown, in_order
from sdforge.run.sketch import sketch
from sdforge.run.speed import begin_step, tune
from sdforge.run.states import Stopped, load_state, save_state
from sdforge.run.tensors import DTYPES, rounded, write_pack
from sdforge.run.texts import Texts
from sdforge.run.watch import Metrics, Samples, Validation
from sdforge.trainings import Training

Report = Callable[..., None]
REPORT_EVERY = 0.2  # seconds
ASK_EVERY = 16  # pictures that are encoded: whether to stop; what has been encoded is kept
SHOWN = 60  # letters of a caption that is talked about


def run_training(order: WorkOrder, report: Report, stopped: Callable[[], bool]) -> Outcome:
    """Run a training to its end. Raises Stopped (the state is kept) or ActionFailed (NaN, unusable pictures)."""
    adapter_module = module_of(order.group, f"{order.method}.adapter")
    table: type[Training] = module_of(order.group, order.method).TABLE
    settings = table.model_construct(**order.settings)
    on = order.the("on")
    report(note="loading the checkpoint")
    diffusion = load_diffusion(order, on, settings.precision)
    adapter: Adapter = adapter_module.begin(settings, diffusion)
    return _Training(order, settings, diffusion, adapter, on).run(report, stopped)


class _Training:
    def __init__(self, order: WorkOrder, settings: Training, diffusion: Diffusion, adapter: Adapter, on: Given) -> None:
        self.order, self.settings, self.diffusion, self.adapter = order, settings, diffusion, adapter
        self.seed = int(order.settings["seed"])
        self.derived = Derived(order.derived)
        learned, held_out = ([_saying(row, adapter) for row in rows] for rows in split(order.the("dataset")))
        subject = self._plan(learned)
        self.shown = [Shown(in_order(subject, settings, self.seed), subject, varies=adapter.varies)]
        if order.inputs.get("prior"):
            # its own stream of numbers: what is learned from does not change by what is kept beside it
            seed, kept = int(H("prior", self.seed)[:12], 16), self._plan(order.the("prior").pictures)
            self.shown.append(Shown(in_order(kept, settings, seed), kept, "prior noise", settings.prior_weight))
        self.pictures = [picture for shown in self.shown for picture in shown.pictures]
        self.latents = Latents(diffusion, on, self.derived)
        self.batches = Batches(settings, self.seed, adapter, diffusion, self.latents)
        cached = adapter.text_is_frozen and adapter.reads_captions and not settings.shuffle
        self.texts = Texts(diffusion, on, self.derived) if cached and diffusion.text_encoders else None
        adapter.prepare(order, self.shown[0].pictures)
        self.groups = adapter.groups()
        self.parameters = dict(self._named())
        self.optimizer = make_optimizer(settings, self.groups, diffusion.device)
        shapes = len({picture.size for picture in self.pictures})
        static = adapter.static and not order.how.get("vram")
        self.tuned = tune(diffusion, set(self.parameters.values()), steps=settings.steps, shapes=shapes, static=static)
        self.average = Average(settings.ema, self.parameters) if settings.ema else None
        self.micro_batch = settings.batch
        self.chosen = ""  # how it was made to fit into memory
        self.waiting: list[nn.Module] = []  # networks that no step runs, where they are kept off the device
        states = Path(order.states) if order.states else None
        self.validation = Validation(self._plan(held_out), self.latents, diffusion, settings.steps)
        captions = [picture.caption for picture in self.shown[0].pictures] if adapter.reads_captions else [""]
        wish = order.how.get("samples", {}) | ({} if diffusion.text_encoders else {"prompts": [""]})
        self.samples = Samples(wish, captions, states / "samples" if states else None)
        self.metrics = Metrics(
            states / "metrics.jsonl" if states else None,
            order.how.get("tensorboard", ""),
            order.target.replace(":", "-"),
        )
        self.ahead: dict[int, list[Batch]] = {}  # a step's batches, made ready before it begins
        self.losses: list[float] = []
        self.resumed: list[dict[str, Any]] = []

    def _plan(self, rows: list[list[Any]]) -> list[Picture]:
        resolution = self.settings.resolution or self.diffusion.resolution
        return plan_pictures(rows, resolution, buckets=self.settings.buckets)

    def run(self, report: Report, stopped: Callable[[], bool]) -> Outcome:
        began = time.monotonic()
        try:
            self._prepare(report, stopped)
            step = self._resume(report)
            self._loop(step, report, stopped)
            return self._outcome(time.monotonic() - began)
        finally:
            self.metrics.close()

    def _loop(self, step: int, report: Report, stopped: Callable[[], bool]) -> None:
        how = self.order.how.get("states", {})
        every, minutes = int(how.get("steps", 0)), float(how.get("minutes", 1.0))
        saved, last = time.monotonic(), 0.0
        steps = self.settings.steps
        self._watch(step, report)
        set_training(self.optimizer, on=True)
        while step < steps:
            if stopped():
                self._save(step)
                raise Stopped
            loss = self._step(step)
            step += 1
            self.losses.append(loss)
            self.metrics.note(step, loss=loss, learning_rate=float(self.optimizer.param_groups[0]["lr"]))
            now = time.monotonic()
            if now - last >= REPORT_EVERY or step == steps:
                report(step=step, steps=steps, loss=loss)
                self.metrics.flush()
                last = now
            self._watch(step, report)
            if step < steps and ((every and step % every == 0) or now - saved >= 60 * minutes):
                self._save(step)
                report(state=step)
                saved = time.monotonic()
        set_training(self.optimizer, on=False)

    def _prepare(self, report: Report, stopped: Callable[[], bool]) -> None:
        """Encode what every step would encode again; whatever fails, fails before hours are spent."""
        with torch.no_grad():
            for picture in dict.fromkeys(self.shown[0].pictures) if self.adapter.varies else ():
                read_pixels(picture, flip=False)
                if picture.mask:
                    read_mask(picture)
            once = self.shown[1:] if self.adapter.varies else self.shown
            distinct = list(dict.fromkeys(picture for shown in once for picture in shown.pictures))
            for picture in self.validation.pictures:
                self.latents.of(picture, flip=False)
            for i, picture in enumerate(distinct):
                for flip in (False, True) if self.settings.flip else (False,):
                    self.latents.of(picture, flip=flip)
                if picture.mask:
                    self.batches.mask(picture)
                report(note=f"encoding pictures {i + 1}/{len(distinct)}")
                if (i + 1) % ASK_EVERY == 0 and stopped():
                    raise Stopped
            if self.texts:
                captions = [p.caption for p in [*self.pictures, *self.validation.pictures]]
                for caption in sorted({"", *captions}):
                    self.texts.of([caption])
        if self.adapter.reads_captions and self.diffusion.text_encoders:
            self._say_what_is_cut(report)
        self.reused = dict(self.derived.reused)  # what steps read once more, as memory did not hold it, counts no more
        report(
            derived={"reused": self.reused, "made": dict(self.derived.made)},
            buckets=describe(self.shown[0].pictures),
        )
        if budget := int(self.order.how.get("vram", 0)):
            self._fit(budget, report)

    def _say_what_is_cut(self, report: Report) -> None:
        captions = sorted({picture.caption for picture in self.pictures})
        cut = [caption for caption in captions if self.diffusion.words.is_cut(caption)]
        if cut:
            which = f"{len(cut)} of {len(captions)} captions are" if len(cut) > 1 else "a caption is"
            report(remark=f"{which} longer than the {READ} tokens that are read: {cut[0][:SHOWN]!r}…")

    # -- a step ----------------------------------------------------------------------------------------------------

    def _step(self, step: int) -> float:
        for group, own in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = own.learning_rate * pace(self.settings, step)
        self.adapter.begins(step)
        batches = self.ahead.pop(step, None) or [self.batches.make(shown, step) for shown in self.shown]
        self.optimizer.zero_grad(set_to_none=True)
        begin_step(self.tuned)
        losses: list[Tensor] = []
        if len(batches) == 1 and self.micro_batch >= self.settings.batch:
            losses.append(self._loss(batches).mean())
            losses[0].backward()  # type: ignore[no-untyped-call]
        else:
            for start in range(0, self.settings.batch, self.micro_batch):
                parts = [batch.part(start, start + self.micro_batch) for batch in batches]
                losses.append(self._loss(parts).sum() / self.settings.batch)
                losses[-1].backward()  # type: ignore[no-untyped-call]
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        self.optimizer.step()
        self.adapter.stepped(step)
        if self.average:
            self.average.update(step)
        if step + 1 < self.settings.steps and not self.adapter.varies:
            # a device still computes what was asked of it, and is waited for only where the loss is read
            self.ahead = {step + 1: [self.batches.make(shown, step + 1) for shown in self.shown]}
        return self._read(losses, step)

    def _read(self, losses: list[Tensor], step: int) -> float:
        """Return the loss of a step. Raises ActionFailed if it is no number: then nothing of the step is kept."""
        value = sum(float(loss.detach()) for loss in losses)
        if not math.isfinite(value):
            other = "" if self.settings.precision == "fp32" else ', or precision = "fp32"'
            raise ActionFailed(f"the loss became {value} at step {step + 1}", hint=f"a smaller learning_rate{other}")
        return value

    def _loss(self, batches: list[Batch]) -> Tensor:
        """Return the loss of every picture of the first batch, the others' added with their weights.

        The halves are means of their own: how much the prior counts does not depend on the numbers of pictures.
        """
        if len(batches) == 1 or batches[0].noisy_BCHW.shape != batches[1].noisy_BCHW.shape:
            predictions = [self._predict(batch) for batch in batches]
        else:
            predictions = list(self._predict(joined(batches)).chunk(len(batches)))
        total_B = None
        for shown, batch, predicted in zip(self.shown, batches, predictions, strict=True):
            loss_B = _mean_square(predicted, batch)
            loss_B = loss_B * self.diffusion.schedule.min_snr_weight(batch.timesteps_B, self.settings.min_snr)
            total_B = loss_B if total_B is None else total_B + shown.weight * loss_B
        assert total_B is not None
        more = self.adapter.also(batches[0])
        return total_B if more is None else total_B + more

    def _predict(self, batch: Batch) -> Tensor:
        text = self._text(batch.captions)
        condition = self.adapter.condition(batch, text and self.diffusion.silenced(text, batch.dropped))
        condition = self.diffusion.sized(condition.to(self.diffusion.device), batch.framings)
        return self.adapter.predict(batch, condition)

    def _text(self, captions: list[str]) -> Conditioning | None:
        if self.texts:
            return self.texts.of(captions)
        if not self.diffusion.text_encoders or not self.adapter.reads_captions:
            return None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.adapter.text_is_frozen):
            return self.diffusion.encode_text(captions)

    # -- watching --------------------------------------------------------------------------------------------------

    def _watch(self, step: int, report: Report) -> None:
        """Judge held-out pictures and draw samples, where it is time, with what would be saved now."""
        steps = self.settings.steps
        validate, draw = self.validation.due(step, steps), self.samples.due(step, steps)
        if not (validate or draw):
            return
        set_training(self.optimizer, on=False)
        if self.average:
            self.average.exchange()
        if validate:
            with torch.no_grad():
                loss = self.validation.look(step, self._predict)
            self.metrics.note(step, validation=loss)
            report(validation=loss, at=step)
        if draw:
            with self._all_there():
                self.samples.draw(step, self.diffusion)
        if self.average:
            self.average.exchange()
        set_training(self.optimizer, on=True)

    @contextmanager
    def _all_there(self) -> Iterator[None]:
        """Let networks that wait off the device be there meanwhile."""
        called, self.waiting = self.waiting, []  # within, nothing is left to call
        for network in called:
            network.to(self.diffusion.device)
        try:
            yield
        finally:
            for network in called:
                network.to("cpu")
            self.waiting = called

    def _fit(self, budget: int, report: Report) -> None:
        """Choose micro-batch, checkpointing and offload for so many bytes of the device's memory."""
        diffusion = self.diffusion
        networks = [diffusion.unet, *diffusion.text_encoders.values()]
        idle = ([] if self.adapter.varies else [diffusion.vae]) + (networks[1:] if self.texts else [])
        idle += [diffusion.image_encoder] if diffusion.image_encoder else []
        weights = [t for network in networks for t in network.state_dict(keep_vars=True).values()]
        once = [self.batches.make(shown, 0).part(0, 1) for shown in self.shown]
        plain = kept_bytes(lambda: self._loss(once).sum(), weights)
        set_checkpointing(networks, on=True)
        twice = kept_bytes(lambda: self._loss(once).sum(), weights)
        set_checkpointing(networks, on=False)
        busy = [t for n in [*networks, diffusion.vae] if n not in idle for t in n.state_dict().values()]
        numbers = sum(parameter.numel() for parameter in self.parameters.values())
        # a gradient for everything that is trained, and what is kept of it besides
        fixed = held_bytes(busy) + held_bytes(self.parameters.values()) + self.settings.beside() * numbers
        waiting = held_bytes(t for n in idle for t in n.state_dict().values())
        choice = choose(budget, fixed, waiting, plain, twice, self.settings.batch)
        self.micro_batch, self.chosen = choice.micro_batch, str(choice)
        set_checkpointing(networks, on=choice.checkpointing)
        if choice.offload:
            self.waiting, self.derived.making = idle, self._all_there  # what the cache has lost is made once more
            for network in idle:
                network.to("cpu")
        report(note=f"fits into {budget / 1e9:.3g} GB: {choice}", fits=str(choice))

    # -- states ----------------------------------------------------------------------------------------------------

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for i, group in enumerate(self.groups):
            for name in sorted(group.parameters):
                yield f"{i}.{name}", group.parameters[name]

    def _fingerprint(self) -> dict[str, Any]:
        """On what it is computed; a step that is computed in parts rounds in other places."""
        parts: dict[str, Any] = {} if self.micro_batch >= self.settings.batch else {"micro_batch": self.micro_batch}
        parts |= {"tuned": ", ".join(self.tuned)} if self.tuned else {}
        return fingerprint(self.diffusion.device) | parts

    def _save(self, step: int) -> None:
        tensors, optimizer = taken_down(step, self.parameters, self.optimizer, self.average)
        notes = {
            "losses": self.losses,
            "fingerprint": self._fingerprint(),
            "resumed": self.resumed,
            "validation": self.validation.found,
            "optimizer": optimizer,
        }
        save_state(Path(self.order.states), step, tensors, notes)

    def _resume(self, report: Report) -> int:
        state = load_state(Path(self.order.states), self.settings.steps) if self.order.states else None
        if state is None:
            return 0
        put_back(state, self.parameters, self.optimizer, self.average)
        self.losses = list(state.notes["losses"])
        self.validation.found = list(state.notes.get("validation", []))
        here, there = self._fingerprint(), state.notes["fingerprint"]
        self.resumed = [
            *state.notes["resumed"],
            {"step": state.step, **({} if here == there else {"fingerprint": there})},
        ]
        report(resumed=state.step, same=here == there)
        return state.step

    # -- the end ---------------------------------------------------------------------------------------------------

    def _outcome(self, seconds: float) -> Outcome:
        if self.average:
            self.average.exchange()
        learned = self.adapter.learned()
        dtype = DTYPES[SAFETENSORS[self.settings.dtype]]
        tensors = {
            component: {name: rounded(name, tensor.detach().cpu(), dtype) for name, tensor in table.items()}
            for component, table in learned.components.items()
        }
        outcome = write_pack(Path(self.order.work), tensors)
        lines, norm = sketch(learned.update)
        outcome.facts = learned.facts
        outcome.grade = "B"
        outcome.fingerprint = self._fingerprint()
        outcome.record = {
            "losses": self.losses,
            "seconds": round(seconds, 3),
            "steps": self.settings.steps,
            "sketch": lines,
            "norm": norm,
            "resumed": self.resumed,
            "derived": {"reused": self.reused, "made": dict(self.derived.made)},
        }
        if self.validation.found:
            outcome.record |= {"validation": self.validation.found, "recommended": self.validation.recommended}
        if drawn := self.samples.drawn():
            outcome.record["samples"] = drawn
        if self.chosen:
            outcome.record["fits"] = self.chosen
        return outcome


def _saying(row: list[Any], adapter: Adapter) -> list[Any]:
    """Return a row of the data set with the caption that the method gives it."""
    path, sha256, caption, *rest = row
    return [path, sha256, adapter.caption(caption), *rest]


def _mean_square(predicted_BCHW: Tensor, batch: Batch) -> Tensor:
    """Return every picture's mean square error; with a mask, the mean over what counts."""
    square_BCHW = (predicted_BCHW - batch.target_BCHW).square()
    if batch.masks_B1HW is None:
        return square_BCHW.mean((1, 2, 3))
    weight_BCHW = batch.masks_B1HW.expand_as(square_BCHW)
    # a view may show nothing that counts: it teaches nothing then
    return (square_BCHW * weight_BCHW).sum((1, 2, 3)) / weight_BCHW.sum((1, 2, 3)).clamp_min(1e-6)


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
