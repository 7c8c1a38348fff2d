"""Takes in how actions end: what they made is published, pinned and put into `out/`; what went wrong is answered."""

from __future__ import annotations

import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdforge.errors import ActionFailed, BrokenPromise, ForgeError, ResourceError
from sdforge.lockfile import LockFile
from sdforge.order import Outcome
from sdforge.orders import keeps_states, state_folder
from sdforge.placing import place
from sdforge.plan import Step
from sdforge.report.preset import file_row
from sdforge.results import Made, Publisher
from sdforge.session import Session
from sdforge.store.entries import Result
from sdforge.under_way import Reporter, Running, Summary


class Intake:
    """What comes of the actions of one build.

    held: ids of previews that are drawn, and placed when they have passed.
    """

    def __init__(self, session: Session, lockfile: LockFile, reporter: Reporter, summary: Summary) -> None:
        self.session, self.lockfile, self.reporter, self.summary = session, lockfile, reporter, summary
        self.store = session.store
        self.held: set[str] = set()
        self._changed: dict[str, int] = {}  # id → how often an input of it changed while it ran

    def take(self, running: Running, event: dict[str, Any]) -> None:
        """Take in how an action ended."""
        step = running.step
        try:
            if event["event"] == "done":
                self._keep(running, Outcome(**event["outcome"]))
            elif event["event"] == "fetched":
                self._fetched(running, event)
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

    def _fetched(self, running: Running, event: dict[str, Any]) -> None:
        """Take a pinned result in that has come; the next plan finds it in the store."""
        step, pin = running.step, running.step.pin
        assert pin is not None
        self.store.keep(event["result"], event["manifest"])
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
        """Keep what a worker said where a person finds it; return the path in the project, "" where it said nothing."""
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
        self._changed[step.id] = self._changed.get(step.id, 0) + 1
        if self._changed[step.id] > 1:
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
        if step.node.target.signature.group != "trainings" and keeps_states(step):
            shutil.rmtree(state_folder(self.session, step, running.manifest), ignore_errors=True)
        if step.node.target.placed and step.checks and result.kind == "pictures":
            self.held.add(step.id)
        elif step.node.target.placed:
            self.place(step, result, running.work)
        if result.kind != "verdict" or result.facts["passed"]:  # of a check that fails the next plan tells
            self.reporter.finished(step, result, seconds)

    def place(self, step: Step, result: Result, work: Path | None) -> None:
        """Put a preset's files into `out/`."""
        step = replace(step, result=result)
        moved, paths = place(self.session, step, work)
        if self.session.project.made:  # a folder that nobody sees
            return
        names = self.session.outputs.names(step)
        self.reporter.wrote(step, paths, moved, [file_row(names[file], row) for file, row in result.files.items()])


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
