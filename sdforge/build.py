"""The loop with effects: plan, run what must run, keep the results, write the lock, until nothing is left to do."""

from __future__ import annotations

import os
import select
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from sdforge.chronicle import enter, presets, reasons
from sdforge.devices import devices
from sdforge.errors import ActionFailed, BrokenPromise, BusyError, CheckFailed, ForgeError, Interrupted, ResourceError
from sdforge.executors import Executor, Handle
from sdforge.grids import write_grids
from sdforge.lockfile import LockFile
from sdforge.looks import note_passed
from sdforge.method import method
from sdforge.one_pass import Pass
from sdforge.order import Order, Outcome
from sdforge.orders import make_order, state_folder
from sdforge.outputs import FAILED
from sdforge.places import OUT
from sdforge.placing import place, show_failed
from sdforge.plan import Plan, Step
from sdforge.report.preset import file_row
from sdforge.results import Made, Publisher
from sdforge.room import refuse_lack
from sdforge.session import Session
from sdforge.store import Result
from sdforge.store.files import Lock
from sdforge.telling import REPORT, tell

TICK = 0.2  # seconds between looks at locks that others hold
GRACE = 10.0  # seconds for workers to keep their state after an interrupt


class Reporter(Protocol):
    """Who tells a person (or a program) how it goes."""

    def planned(self, plan: Plan) -> None: ...
    def started(self, step: Step, device: str) -> None: ...
    def progress(self, step: Step, event: dict[str, Any]) -> None: ...
    def waiting(self, step: Step, holder: str) -> None: ...
    def finished(self, step: Step, result: Result | None, seconds: float) -> None: ...
    def failed(self, step: Step, error: ForgeError) -> None: ...
    def wrote(self, step: Step, paths: list[str], moved: list[str], files: list[dict[str, Any]]) -> None: ...
    def drawn(self, path: str, moved: list[str]) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass
class Options:
    """How to build. jobs: actions side by side; device: `auto`, `cpu`, `cuda`, `cuda:N`.

    how: what runners are told beside it: `states`, `samples`, `vram` (bytes), `tensorboard`.
    """

    jobs: int = 1
    device: str = "auto"
    keep_going: bool = False
    wait: bool = True
    threads: int = 1
    how: dict[str, Any] = field(default_factory=dict)


@dataclass
class Running:
    """An action at work. key: the one that is locked; formula: what a formula's result will hold."""

    step: Step
    handle: Handle
    lock: Lock
    device: Lock | None
    work: Path
    key: str
    manifest: str
    began: float
    formula: Pass | None = None


@dataclass
class Summary:
    """What a build did, by the ids of the targets."""

    built: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)  # whose files were written again
    fetched: list[str] = field(default_factory=list)
    failed: dict[str, ForgeError] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    pinned: set[str] = field(default_factory=set)  # content keys that had a pin before
    plan: Plan | None = None

    @property
    def done(self) -> dict[str, list[str]]:
        """What was done → ids."""
        return {"built": self.built, "fetched": self.fetched, "restored": self.restored}


class Build:
    """One build: from a plan to nothing left to do."""

    def __init__(self, session: Session, executor: Executor, reporter: Reporter, options: Options) -> None:
        self.session, self.executor, self.reporter, self.options = session, executor, reporter, options
        self.store, self.outputs = session.store, session.outputs
        self.lockfile = LockFile(session)
        self.running: list[Running] = []
        self.waiting: dict[str, Lock] = {}
        self.patient: set[str] = set()  # ids of steps that have said that they wait for a device
        self.summary = Summary()
        self.changed: dict[str, int] = {}  # id → how often an input of it changed while it ran
        self.signals: list[int] = []
        self.held: set[str] = set()  # ids of previews that are drawn, and placed when they have passed

    def run(self, wanted: list[str]) -> Summary:
        """Build what is wanted. Raises Interrupted, and ForgeError for what concerns the whole build."""
        plan = self.session.plan(wanted)
        self.reporter.planned(plan)
        why = reasons(self.session, plan)
        self.lockfile.check(plan)
        self._keep_notes(plan)
        self._note_verdicts(plan)
        refuse_lack(self.session, plan)
        if self.session.unreachable:
            self.reporter.note(f"{self.session.unreachable}; going on without it")
        self.store.prepare()
        self.summary.pinned = set(self.session.lock.results)
        with self._listening(), self.store.guard() as guard:
            guard.share(wait=True)
            try:
                plan = self._loop(plan, wanted)
            finally:
                self._end()
        for name in self.lockfile.write(plan):
            self.reporter.note(f"source `{name}` is not what it was: pinned anew")
        enter(self.session, plan, self.summary.done, why)
        self._remember(plan)
        self._show_failed(plan)
        if self.session.project.made is None:  # nobody reads of what is made where nobody looks
            for path, moved in write_grids(self.session, plan, self.outputs):
                self.reporter.drawn(path.relative_to(self.session.project.root).as_posix(), moved)
            self._tell(plan)
        self.summary.plan = plan
        return self.summary

    # -- the loop --------------------------------------------------------------------------------------------------

    def _loop(self, plan: Plan, wanted: list[str]) -> Plan:
        while True:
            if self.signals:
                self._interrupt()
            anew = False
            if self._breaks_off():
                self._stop_all()
                if not self.running:
                    self._skip(plan)
                    return plan
            else:
                anew = self._start_ready(plan)
            if not (anew or self.running or self.waiting):
                self._skip(plan)
                return plan
            if anew or self._poll():
                plan = self._replan(wanted)

    def _breaks_off(self) -> bool:
        """Say whether nothing more is begun: a check that fails holds back its preset's files and nothing else."""
        broken = [error for error in self.summary.failed.values() if not isinstance(error, CheckFailed)]
        return bool(broken) and not self.options.keep_going

    def _replan(self, wanted: list[str]) -> Plan:
        plan = self.session.plan(wanted)
        self._keep_notes(plan)
        self._note_verdicts(plan)
        return plan

    def _note_verdicts(self, plan: Plan) -> None:
        """Note the checks that failed, now or when the same pictures were looked at before."""
        for step in _asked_checks(plan):
            if step.state == "reuse" and step.failed and step.id not in self.summary.failed:
                assert step.result is not None
                name = self.outputs.folder(step).name
                error = CheckFailed(
                    str(step.result.facts["says"]),
                    f"out/{name} stays as it was; the pictures are in out/{FAILED}/{name}; "
                    "--no-checks writes it all the same",
                )
                self.summary.failed[step.id] = error
                self.reporter.failed(step, error)

    def _left(self, plan: Plan) -> list[Step]:
        return [step for step in plan.to_do if step.id not in self.summary.failed]

    def _skip(self, plan: Plan) -> None:
        self.summary.skipped = [step.id for step in self._left(plan)]

    def _start_ready(self, plan: Plan) -> bool:
        """Start what can be started. Returns whether the plan has to be made anew."""
        busy = {running.step.id for running in self.running}
        keys = {running.key for running in self.running}
        for step in plan.to_do:
            if len(self.running) >= self.options.jobs:
                return False
            if step.id in busy or step.id in self.summary.failed or not self._is_ready(plan, step):
                continue
            if self._locking_key(step) in keys:  # a twin under another name is at work
                continue
            if self._start(step):
                return True
        return False

    def _is_ready(self, plan: Plan, step: Step) -> bool:
        """Say whether all bytes that a step reads are there."""
        if step.state == "fetch":
            return True
        if step.node.target.placed and self._waits_for_checks(plan, step):
            return False
        if any(artifact is None for _, artifact in step.inputs):
            return False
        busy = {running.step.id for running in self.running}
        for link, artifact in step.inputs:
            other = plan.steps.get(link.id)
            if other is None or artifact is None:
                continue
            if other.state in ("build", "maybe", "fetch", "running"):
                return False
            reads = step.node.target.role(link.use.role).reads
            needed = [maker for name, maker in other.makers.items() if name.startswith(reads or ("\0",))]
            if any(maker in plan.steps and (plan.steps[maker].to_do or maker in busy) for maker in needed):
                return False
        return all(self._is_ready(plan, each) for each in self.session.planner().within(step))

    def _waits_for_checks(self, plan: Plan, step: Step) -> bool:
        """Say whether a preset's files, or its drawn previews, must not be put into `out/` yet."""
        if not self.session.checked:
            return False
        makes = step.node.target.signature.makes
        drawn = plan.steps.get(f"{step.node.recipe.name}:preset.previews")
        if makes == "files" and drawn is not None and drawn.state not in ("reuse", "unneeded"):
            return True  # a preset that cannot be drawn, or is black, is not written either
        return (makes == "files" or step.restore) and not all(check.passed for check in step.checks)

    def _locking_key(self, step: Step) -> str:
        return step.content_key or step.key

    def _start(self, step: Step) -> bool:
        """Start a step. Returns whether the plan has to be made anew instead of waiting for it."""
        key, manifest = self._locking_key(step), step.content_manifest or step.manifest
        lock = self.waiting.get(step.id) or self.store.lock(key)
        if not lock.acquire(wait=False):
            if not self.options.wait:
                raise BusyError(
                    f"{step.id} is being made by process {lock.holder()}", hint="without --no-wait it is waited for"
                )
            if step.id not in self.waiting:
                self.waiting[step.id] = lock
                self.reporter.waiting(step, lock.holder())
            return False
        waited = self.waiting.pop(step.id, None) is not None
        if not step.restore and step.id not in self.session.retrain and self._found(step, key, waited):
            lock.release()
            return True
        if step.restore and step.id in self.held and step.result:
            self.held.discard(step.id)
            self._place(step, step.result, None)
            lock.release()
            return True
        if step.restore:
            if step.id in self.summary.restored:
                raise BrokenPromise(
                    f"the files of {step.id} were written, and are not what was written",
                    hint="does something else write into out/ at the same time?",
                )
            self.summary.restored.append(step.id)
        if step.restore and self._restored(step):
            lock.release()
            return True
        if step.state == "fetch":
            self._fetch(step, lock, key, manifest)
            return False
        chosen = self._device(step)
        if chosen is None:
            self.waiting[step.id] = lock
            return False
        try:
            self._submit(step, lock, key, manifest, *chosen)
        except ForgeError:
            lock.release()
            raise
        return False

    def _found(self, step: Step, key: str, waited: bool) -> bool:
        """Say whether somebody else has made a step's result since the plan was made."""
        before = len(self.store.known(key).results)
        found = self.store.fresh(key)
        if len(found.results) <= before:
            return False
        if waited:
            self.reporter.finished(step, found.results[0], 0.0)
        return True

    def _submit(self, step: Step, lock: Lock, key: str, manifest: str, device: str, guard: Lock | None) -> None:
        work = self.store.workplace()
        how = {"device": device, "threads": self.options.threads, **self.options.how}
        formula = self.session.one_pass(step) if step.kind == "formula" else None
        order = make_order(self.session, step, key, manifest, work, how, formula)
        step.state = "running"
        goes = step.kind == "content" and step.node.target.signature.makes not in ("files", "verdict")
        self.reporter.started(step, (self.executor.elsewhere if goes else "") or device)
        bytes_only = formula is not None and not order.compute  # all are there: an index is written, no more
        if bytes_only or getattr(method(order.method).module, "INLINE", False):
            handle: Handle = _Inline(None if bytes_only else order)
        else:
            handle = self.executor.submit(order, str(work / "log.txt"), lock.fd)
        self.running.append(Running(step, handle, lock, guard, work, key, manifest, time.monotonic(), formula))

    def _fetch(self, step: Step, lock: Lock, key: str, manifest: str) -> None:
        """Have a pinned result from the remote cache, beside whatever else runs."""
        from sdforge.exchange import fetching

        assert step.pin is not None
        assert self.session.sharing is not None
        step.state = "running"
        self.reporter.started(step, "remote")
        handle = fetching(self.session.sharing, step.pin)
        work = self.store.workplace()
        self.running.append(Running(step, handle, lock, None, work, key, manifest, time.monotonic()))

    def _device(self, step: Step) -> tuple[str, Lock | None] | None:
        """Choose where an action computes, or None while all devices are taken.

        Formulas, what only moves bytes and what needs no torch need no device.
        """
        signature = step.node.target.signature
        module = method(signature.name).module
        light = signature.makes == "verdict" and (getattr(module, "INLINE", False) or getattr(module, "BARE", False))
        if signature.kind == "formula" or signature.makes == "files" or light:
            return "cpu", None
        if self.executor.elsewhere:  # there the engine says what is free
            return self.options.device, None
        for name in devices(self.options.device):
            if name == "cpu":
                return name, None
            guard = Lock(device_locks() / f"{name.replace(':', '-')}.lock")
            if guard.acquire(wait=False):
                return name, guard
            holder = guard.holder()
            guard.release()
        if step.id not in self.patient:
            self.patient.add(step.id)
            self.reporter.waiting(step, f"{name}, which process {holder} uses")
        return None

    def _restored(self, step: Step) -> bool:
        """Write files again whose bytes the store has as they are (pictures); exports are written by their action.

        Of an export that is whole it is only the description that is put together anew.
        """
        if step.node.target.signature.makes != "pictures" and not self.outputs.written(step):
            return False
        assert step.result is not None
        self._place(step, step.result, None)
        self.reporter.finished(step, step.result, 0.0)
        return True

    # -- what happens ----------------------------------------------------------------------------------------------

    def _poll(self) -> bool:
        """Wait for events, and take them in. Returns whether the plan has to be made anew."""
        if self.running:
            files = [running.handle.fileno() for running in self.running]
            select.select([fd for fd in files if fd >= 0], [], [], TICK if min(files) >= 0 else 0)
        elif self.waiting:
            time.sleep(TICK)
        anew = False
        for running in list(self.running):
            for event in running.handle.poll():
                if event["event"] == "progress":
                    self.reporter.progress(running.step, event)
                else:
                    self.running.remove(running)
                    self._take(running, event)
                    anew = True
        return anew

    def _take(self, running: Running, event: dict[str, Any]) -> None:
        """Take in how an action ended."""
        step = running.step
        try:
            if event["event"] == "done":
                self._keep(running, Outcome(**event["outcome"]))
            elif event["event"] == "fetched":
                self._fetched(running)
            elif event["event"] == "missed":
                self._missed(step, event)
            elif event["event"] == "stopped":
                self.summary.stopped.append(step.id)
            elif event["event"] == "damaged":
                if step.id in self.summary.restored:
                    self.summary.restored.remove(step.id)  # its files were not written
                self._heal(step, event)
            elif event["event"] == "lost":
                raise ActionFailed(
                    f"the worker of {step.id} died ({_death(event['code'])})",
                    "what it had kept of its state is there: the same command goes on from it",
                    self._kept_log(running),
                )
            else:
                raise _error_of(event, self._kept_log(running))
        except ForgeError as error:
            self.summary.failed[step.id] = error
            self.reporter.failed(step, error)
        finally:
            shutil.rmtree(running.work, ignore_errors=True)
            running.lock.release()
            if running.device:
                running.device.release()

    def _fetched(self, running: Running) -> None:
        """Take a pinned result in that has come; the next plan finds it in the store."""
        step, pin = running.step, running.step.pin
        assert pin is not None
        found = {result.digest: result for result in self.store.fresh(pin.key).results}
        if step.key != pin.key:
            self.store.add_alias(step.key, pin.key, step.manifest)
        self.lockfile.pin_new(step, found[pin.digest], running.manifest)
        self.summary.fetched.append(step.id)
        step.state = "fetch"
        self.reporter.finished(step, found[pin.digest], time.monotonic() - running.began)

    def _missed(self, step: Step, event: dict[str, Any]) -> None:
        """Plan anew without a remote cache that does not have, or does not honestly have, what it offered."""
        assert step.pin is not None
        if event["gone"]:
            self.session.leave_remote(ResourceError(event["message"]))
        elif self.session.sharing is not None:
            self.session.sharing.refuse(step.pin)
        self.reporter.note(f"{step.id}: {event['message']}")
        if self.session.locked:
            raise BrokenPromise(
                f"{step.id}: the pinned result {step.pin.digest[:12]} is not to be had",
                hint="`forge build` without --locked trains it",
            )

    def _push(self, result: Result) -> None:
        """Put what was trained into the remote cache, where it is told to; a cache that does not take it is left."""
        sharing = self.session.sharing
        if sharing is None or not sharing.writes:
            return
        try:
            sharing.push(result, lambda done, total: None)  # noqa: ARG005
        except ForgeError as error:
            self.session.leave_remote(error)
            self.reporter.note(f"{error.message}; it was not put there")

    def _kept_log(self, running: Running) -> str:
        log = running.work / "log.txt"
        if not log.is_file() or not log.stat().st_size:
            return ""
        folder = self.session.project.root / ".forge" / "log"
        folder.mkdir(parents=True, exist_ok=True)
        place = folder / f"{running.step.id.replace(':', '-')}-{running.key[:12]}.txt"
        shutil.copyfile(log, place)
        return str(place.relative_to(self.session.project.root))

    def _heal(self, step: Step, event: dict[str, Any]) -> None:
        """Bytes were not what they should be: a source has changed, or an object of the store is damaged."""
        path = Path(event["path"])
        if path.is_relative_to(self.store.root):
            found = self.session.quarantine(path, step)
            if found:
                raise found
            self.reporter.note(f"{event['message']}: set aside, and made again")
            return
        self._count_change(step, event["message"])

    def _count_change(self, step: Step, what: str) -> None:
        """An input changed while an action read it: throw the result away and plan anew, once."""
        self.changed[step.id] = self.changed.get(step.id, 0) + 1
        if self.changed[step.id] > 1:
            raise ActionFailed(
                f"{step.id}: an input keeps changing while it is read ({what})",
                hint="build again when nothing writes to it",
            )
        self.reporter.note(f"an input of {step.id} changed while it was read; planning anew")
        self.session.look_again()

    def _keep(self, running: Running, outcome: Outcome) -> None:
        """Publish what an action made."""
        step = running.step
        if self.session.inputs_changed(step):
            self._count_change(step, "a source was written to")
            return
        seconds = time.monotonic() - running.began
        made = Made(step, outcome, running.key, running.manifest, running.work, seconds, running.formula)
        result = Publisher(self.session, self.lockfile).publish(made)
        if step.kind == "formula" and step.artifact is not None:
            step.artifact = replace(step.artifact, components=step.artifact.components | result.components)
        if not step.restore:
            self.summary.built.append(step.id)
        self.store.note_run(
            f"{step.node.target.signature.name}:{step.node.recipe.family}", _pace(step, outcome, seconds)
        )
        if step.id in self.session.retrain:
            self.store.promote_states(state_folder(self.session, step, running.manifest))
            self.session.retrain.discard(step.id)
            self.lockfile.replace.add(result.key)
            self.summary.pinned.discard(result.key)
            self.session.lock.pin(self.lockfile.pin(step, result, running.manifest), replace=True)
        elif step.node.target.signature.pinned and step.kind == "content":
            self.lockfile.pin_new(step, result, running.manifest)
        if step.node.target.signature.pinned and step.kind == "content":
            self._push(result)
        if step.node.target.placed and step.checks and result.kind == "pictures":
            self.held.add(step.id)
        elif step.node.target.placed:
            self._place(step, result, running.work)
        if result.kind != "verdict" or result.facts["passed"]:  # of a check that fails the next plan tells
            self.reporter.finished(step, result, seconds)

    def _place(self, step: Step, result: Result, work: Path | None) -> None:
        """Put a preset's files into `out/`."""
        step = replace(step, result=result)
        moved, paths = place(self.session, step, work)
        if self.session.project.made:  # a folder that nobody sees
            return
        names = self.outputs.names(step)
        self.reporter.wrote(step, paths, moved, [file_row(names[file], row) for file, row in result.files.items()])

    # -- interrupts ------------------------------------------------------------------------------------------------

    @contextmanager
    def _listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # where no signal arrives
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 -- what signal handlers get
            self.signals.append(number)
            if len(self.signals) > 1:
                for running in self.running:
                    running.handle.kill()

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupt(self) -> None:
        """Let trainings keep their state, then leave."""
        self.reporter.note("stopping: trainings keep their state (once more: at once)")
        self._stop_all()
        until = time.monotonic() + GRACE
        while self.running and time.monotonic() < until and len(self.signals) == 1:
            self._poll()
        kept = ", ".join(self.summary.stopped)
        raise Interrupted(
            f"interrupted; the state of {kept} is kept" if kept else "interrupted",
            hint="the same command goes on from there",
            signal=self.signals[0],
        )

    def _stop_all(self) -> None:
        for running in self.running:
            if not running.step.restore:
                running.handle.stop()

    def _end(self) -> None:
        for running in self.running:
            running.handle.kill()
            shutil.rmtree(running.work, ignore_errors=True)
            running.lock.release()
        for lock in self.waiting.values():
            lock.release()
        self.executor.close()

    # -- around it -------------------------------------------------------------------------------------------------

    def _tell(self, plan: Plan) -> None:
        """Write report and card of the presets that are made."""
        for name in presets(plan):
            for aside in tell(self.session, plan, name):
                self.reporter.note(f"what lay in the way was not ours: it is in {aside} now")
            self.reporter.note(f"report: {OUT}/{name}/{REPORT}")

    def _keep_notes(self, plan: Plan) -> None:
        for key, formula in plan.notes.items():
            self.store.note_formula(key, formula)
        for key, content_key, manifest in plan.aliases:
            self.store.add_alias(key, content_key, manifest)

    def _remember(self, plan: Plan) -> None:
        """Note the keys of every recipe for the next null build, and the project as a root of the cache."""
        keys: dict[str, set[str]] = {}
        for step in plan.steps.values():
            keys.setdefault(step.node.recipe.name, set()).update(filter(None, (step.key, step.content_key)))
        for recipe in {plan.steps[identifier].node.recipe.name for identifier in plan.wanted}:
            self.session.note_keys(plan, recipe)
        for step in plan.steps.values():
            if step.key and self.session.last_key(step) != step.key:
                self.store.note_run(f"last:{self.session.project.root}:{step.id}", step.key)
                self.store.note_preimage(step.key, step.manifest)
                for _, artifact in step.inputs:
                    if artifact is not None and "rows" in artifact.notes:
                        named = {"rows": artifact.notes["rows"], "names": artifact.notes["names"]}
                        self.store.note_whole(artifact.whole, named)
        for recipe, found in keys.items():
            self.store.will_expect(f"{self.session.project.root}:{recipe}", found)
        for step in plan.steps.values():
            whole = step.node.target.placed and step.state == "reuse" and not step.restore
            if whole and step.artifact is not None and step.node.target.signature.makes == "pictures":
                note_passed(self.session, step)
        if self.summary.built or self.summary.restored:
            self.store.register(self.session.project.root)

    def _show_failed(self, plan: Plan) -> None:
        """Put the pictures of presets that failed a check where people can look at them, and those of others away."""
        for step in plan.steps.values():
            if step.node.target.placed and step.node.target.signature.makes == "pictures" and step.result is not None:
                failed = any(isinstance(self.summary.failed.get(check.id), CheckFailed) for check in step.checks)
                show_failed(self.session, step, failed=failed)


def _asked_checks(plan: Plan) -> list[Step]:
    """Return the checks on whose verdict something wanted waits."""
    asked = {check.id: check for identifier in plan.wanted for check in plan.steps[identifier].checks}
    asked |= {i: plan.steps[i] for i in plan.wanted if plan.steps[i].node.target.signature.group == "checks"}
    return list(asked.values())


class _Inline:
    """An action that runs in this process, since it only moves bytes."""

    def __init__(self, order: Order | None) -> None:
        from sdforge.run.__main__ import run_reporting

        self.events: list[dict[str, Any]] = []
        if order is None:
            end: dict[str, Any] = {"event": "done", "outcome": {}}
        else:
            end = run_reporting(
                order, lambda **event: self.events.append({"event": "progress", **event}), lambda: False
            )
        self.events.append(end)

    def fileno(self) -> int:
        return -1

    def poll(self) -> list[dict[str, Any]]:
        events, self.events = self.events, []
        return events

    def stop(self) -> None:
        pass

    def kill(self) -> None:
        pass


def _error_of(event: dict[str, Any], log: str) -> ForgeError:
    if event["code"] == 4:
        return ResourceError(event["message"], event["hint"])
    if event["code"] == 3:
        return BrokenPromise(event["message"], event["hint"])
    return ActionFailed(event["message"], event["hint"], log)


def _death(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"{name}: the system may have been out of memory" if name == "SIGKILL" else name
    return f"exit code {code}"


def _pace(step: Step, outcome: Outcome, seconds: float) -> list[float]:
    """Return [seconds that do not depend on size, seconds per unit], a unit being a step, a picture or a megabyte."""
    units = outcome.record.get("steps") or len(outcome.files) or 1
    inner = float(outcome.record.get("seconds", seconds))
    return [max(0.0, seconds - inner), inner / units] if step.kind == "content" else [0.0, seconds]


def device_locks() -> Path:
    """Return the folder of the devices' locks: outside any cache, since a device is the machine's."""
    base = os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/sdforge-{os.getuid()}"
    return Path(base) / "sdforge"
