"""The loop with effects: plan, run what must run, keep the results, write the lock, until nothing is left to do."""

from __future__ import annotations

import select
import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from sdforge.chapters import presets, reasons, remember
from sdforge.devices import device_lock, devices
from sdforge.errors import BrokenPromise, BusyError, CheckFailed, Interrupted
from sdforge.executors import Executor, Handle, Resources
from sdforge.executors.inline import Inline
from sdforge.intake import Intake
from sdforge.interrupts import Interrupts
from sdforge.lockfile import LockFile
from sdforge.method import method
from sdforge.order import Order
from sdforge.orders import make_order
from sdforge.outputs import FAILED
from sdforge.places import OUT
from sdforge.placing import show_failed, write_grids
from sdforge.plan import Plan, Step
from sdforge.ready import is_ready
from sdforge.resources import is_job, kind_of, resources, selects
from sdforge.room import refuse_lack
from sdforge.session import Session
from sdforge.store.files import Lock
from sdforge.telling import REPORT, tell
from sdforge.under_way import Options, Reporter, Running, Summary

TICK = 0.2  # seconds between looks at locks that others hold
GRACE = 10.0  # seconds for workers to keep their state after an interrupt


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
        self.interrupts = Interrupts(self._kill_all)
        self.intake = Intake(session, self.lockfile, reporter, self.summary)

    def run(self, wanted: list[str]) -> Summary:
        """Build what is wanted. Raises Interrupted, and ForgeError for what concerns the whole build."""
        try:
            return self._run(wanted)
        finally:
            self.executor.close()

    def _run(self, wanted: list[str]) -> Summary:
        plan = self.session.plan(wanted)
        if any(map(self._computes_here, plan.to_do)):
            self.executor.expect()  # it takes a second to read torch, while all else is made ready
        self.reporter.planned(plan)
        why = reasons(self.session, plan)
        self.lockfile.check(plan)
        self._keep_notes(plan)
        self._note_verdicts(plan)
        refuse_lack(self.session, plan)
        if self.session.unreachable:
            self.reporter.note(f"{self.session.unreachable}; going on without it")
        self._note_doubts()
        self.store.prepare()
        self.store.register(self.session.project.root)
        self.summary.pinned = set(self.session.lock.results)
        with self.interrupts.listening(), self.store.guard() as guard:
            guard.share(wait=True)
            try:
                plan = self._loop(plan, wanted)
            finally:
                self._end()
                self.store.sweep()  # for builds killed meanwhile: the next may find nothing to do
        for name in self.lockfile.write(plan):
            self.reporter.note(f"source `{name}` is not what it was: pinned anew")
        remember(self.session, plan, self.summary.done, why)
        self._expect(plan)
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
            if self.interrupts.signals:
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
        self._note_doubts()
        return plan

    def _note_doubts(self) -> None:
        for doubt in self.session.doubts():
            self.reporter.note(doubt)

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
            free = self._free_places()
            if not any(free.values()):
                return False
            if step.id in busy or step.id in self.summary.failed or not self._is_ready(plan, step, busy):
                continue
            if not free[self._goes(step)]:
                continue
            if self._locking_key(step) in keys:  # a twin under another name is at work
                continue
            if self._start(step):
                return True
        return False

    def _is_ready(self, plan: Plan, step: Step, busy: set[str]) -> bool:
        within = self.session.planner().within
        return is_ready(plan, step, busy, within, checked=self.session.checked)

    def _free_places(self) -> dict[bool, int]:
        """Return how many more actions may run as jobs of a cluster (True), and here."""
        jobs = sum(running.resources is not None for running in self.running)
        here = len(self.running) - jobs  # one that turned out to only write an index may be among them
        return {
            True: self.options.jobs_elsewhere - jobs if self.options.cluster else 0,
            False: max(0, self.options.jobs - here),
        }

    def _goes(self, step: Step) -> bool:
        """Say whether a step runs as a job of a cluster."""
        return self.options.cluster is not None and step.state != "fetch" and is_job(self.session, step)

    def _computes_here(self, step: Step) -> bool:
        """Say whether a step runs in a worker of this machine, as far as that is known before it starts."""
        return step.state == "build" and not step.restore and bool(kind_of(step)) and not self._goes(step)

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
        with ExitStack() as held:  # whatever goes wrong: a later build of this process would wait for ever
            held.callback(lock.release)
            if self._is_had(step, key, waited):
                return True
            if step.state == "fetch":
                self._fetch(step, lock, key, manifest)
            elif (chosen := self._device(step)) is None:
                self.waiting[step.id] = lock
            else:
                self._submit(step, lock, key, manifest, *chosen)
            held.pop_all()
        return False

    def _is_had(self, step: Step, key: str, waited: bool) -> bool:
        """Say whether nothing has to run: the files could be written again, or somebody else has made the result."""
        if step.restore:
            return self._restored(step)
        if step.id in self.session.retrain:
            return False
        before = len(self.store.known(key).results)
        found = self.store.fresh(key)
        if len(found.results) <= before:
            return False
        if waited:
            self.reporter.finished(step, found.results[0], 0.0)
        return True

    def _restored(self, step: Step) -> bool:
        """Write files again whose bytes the store has as they are (pictures); exports are written by their action.

        Of an export that is whole it is only the description that is put together anew.
        """
        assert step.result is not None
        if step.id in self.intake.held:
            self.intake.held.discard(step.id)
            self.intake.place(step, step.result, None)
            return True
        if step.id in self.summary.restored:
            with self.outputs.lock() as lock:  # another build that makes the same may just be writing
                lock.acquire(wait=True)
                if self.outputs.whole(step):
                    return True
            raise BrokenPromise(
                f"the files of {step.id} were written, and are not what was written",
                hint="does something else write into out/ at the same time?",
            )
        self.summary.restored.append(step.id)
        if step.node.target.signature.makes != "pictures" and not self.outputs.written(step):
            return False
        self.intake.place(step, step.result, None)
        self.reporter.finished(step, step.result, 0.0)
        return True

    def _submit(self, step: Step, lock: Lock, key: str, manifest: str, device: str, guard: Lock | None) -> None:
        """Have a step run. guard: the lock of its device, which is free again if that cannot be."""
        with ExitStack() as held:
            held.callback(_release, guard)
            work = self.store.workplace()
            held.callback(shutil.rmtree, work, ignore_errors=True)
            how = {"device": device, "threads": self.options.threads, **self.options.how}
            formula = self.session.one_pass(step) if step.kind == "formula" else None
            order = make_order(self.session, step, key, manifest, work, how, formula)
            bytes_only = formula is not None and not order.compute  # all are there: an index is written, no more
            asked = self._resources(step) if self._goes(step) and not bytes_only else None
            if asked is None and selects(order) and (idle := self._idle_device()):  # the processor selects the same
                device, guard = idle
                held.callback(_release, guard)
                order = replace(order, how=how | {"device": device})
            step.state = "running"
            self.reporter.started(step, self.options.cluster.name if self.options.cluster and asked else device)
            handle = self._handed_over(order, asked, lock, bytes_only=bytes_only)
            running = Running(step, handle, lock, guard, work, key, manifest, time.monotonic(), formula, asked)
            self.running.append(running)
            held.pop_all()

    def _handed_over(self, order: Order, asked: Resources | None, lock: Lock, *, bytes_only: bool) -> Handle:
        """Give an order to whoever runs it. asked: of a cluster; bytes_only: nothing is computed."""
        if bytes_only or getattr(method(order.method).module, "INLINE", False):
            return Inline(None if bytes_only else order)
        if self.options.cluster and asked:
            return self.options.cluster.submit(order, asked)
        return self.executor.submit(order, str(Path(order.work) / "log.txt"), lock.fd)

    def _resources(self, step: Step) -> Resources:
        """Return what a step asks for as a job."""
        return resources(self.session, step, self.options.device, self.options.threads)

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
        if self._goes(step):  # there the engine says which one is free
            return self.options.device.partition(":")[0] if self._resources(step).gpus else "cpu", None
        if kind_of(step) in ("", "formulas"):
            return "cpu", None
        if found := self._idle_device():
            return found
        if step.id not in self.patient:
            self.patient.add(step.id)
            name = devices(self.options.device)[-1]
            with device_lock(name) as taken:
                self.reporter.waiting(step, f"{name}, which process {taken.holder()} uses")
        return None

    def _idle_device(self) -> tuple[str, Lock | None] | None:
        """Return a device that nobody uses, with its lock, or None while all are taken. The processor has none."""
        for name in devices(self.options.device):
            if name == "cpu":
                return name, None
            guard = device_lock(name)
            if guard.acquire(wait=False):
                return name, guard
            guard.release()
        return None

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
                    self.intake.take(running, event)
                    anew = True
        return anew

    # -- interrupts ------------------------------------------------------------------------------------------------

    def _interrupt(self) -> None:
        """Let trainings keep their state, then leave."""
        self.reporter.note("stopping: trainings keep their state (once more: at once)")
        self._stop_all()
        until = time.monotonic() + GRACE
        while self.running and time.monotonic() < until and len(self.interrupts.signals) == 1:
            self._poll()
        kept = ", ".join(self.summary.stopped)
        raise Interrupted(
            f"interrupted; the state of {kept} is kept" if kept else "interrupted",
            hint="the same command goes on from there",
            signal=self.interrupts.signals[0],
        )

    def _stop_all(self) -> None:
        for running in self.running:
            if not running.step.restore:
                running.handle.stop()

    def _kill_all(self) -> None:
        for running in self.running:
            running.handle.kill()

    def _end(self) -> None:
        self._kill_all()
        for running in self.running:
            shutil.rmtree(running.work, ignore_errors=True)
            _release(running.lock)
            _release(running.device)
        for lock in self.waiting.values():
            lock.release()

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

    def _expect(self, plan: Plan) -> None:
        """Note the keys of every recipe for the next null build."""
        keys: dict[str, set[str]] = {}
        for step in plan.steps.values():
            keys.setdefault(step.node.recipe.name, set()).update(filter(None, (step.key, step.content_key)))
        for recipe, found in keys.items():
            self.store.will_expect(f"{self.session.project.root}:{recipe}", found)

    def _show_failed(self, plan: Plan) -> None:
        """Put the pictures of presets that failed a check where people can look at them, and those of others away."""
        for step in plan.steps.values():
            if step.node.target.placed and step.node.target.signature.makes == "pictures" and step.result is not None:
                failed = any(isinstance(self.summary.failed.get(check.id), CheckFailed) for check in step.checks)
                show_failed(self.session, step, failed=failed)


def _release(lock: Lock | None) -> None:
    if lock:
        lock.release()


def _asked_checks(plan: Plan) -> list[Step]:
    """Return the checks on whose verdict something wanted waits."""
    asked = {check.id: check for identifier in plan.wanted for check in plan.steps[identifier].checks}
    asked |= {i: plan.steps[i] for i in plan.wanted if plan.steps[i].node.target.signature.group == "checks"}
    return list(asked.values())
