"""Actions on other machines, by engines that people run already: a Ray cluster, or Slurm by submitit.

All machines see the cache under the same path (`FORGE_CACHE`), so orders, results and train states need no way of their
own. A job that ends without a word, since its node died or was preempted, is begun again, and goes on from its last
kept state. Of one that would end alike again it is said what to ask for instead.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdforge.errors import UsageError
from sdforge.executors import Cluster, Resources
from sdforge.executors.beside import Beside
from sdforge.executors.jobs import CANCELLED, LIMITS, LOST, MEMORY, Ended, Job, Launcher
from sdforge.executors.ray import RayLauncher
from sdforge.executors.slurm import SubmititLauncher
from sdforge.hidden import hidden
from sdforge.order import Order
from sdforge.places import LOCAL
from sdforge.run.spool import BUILDER, EVENTS, LOG, ORDER, STOP
from sdforge.store.files import publish_bytes

TICK = 0.5  # seconds between looks
LAG = 5.0  # seconds in which what a job wrote last arrives over a network's file system
RETRIES = 3
LINES = 50  # of a job's log that are shown at one look
WIDTH = 300  # letters of such a line
LAST = ("done", "failed", "stopped", "damaged")
FOR_GOOD = {
    CANCELLED: (1, "its job ended: {word}", "somebody wanted that; a build goes on from the last kept state"),
    MEMORY: (4, "its job ran out of memory ({word})", "it asked for {asked}; `memory` {where} asks for more"),
    LIMITS: (4, "its job would wait for ever ({word})", "it asks for {asked}; less can be asked for {where}"),
}  # why a job is not begun again → exit code, what is said, and the way out


class SpoolHandle(Beside):
    """An action on another machine, followed through its folder. target: whose action it is."""

    def __init__(self, launcher: Launcher, folder: Path, target: str, resources: Resources) -> None:
        self.launcher, self.folder, self.resources = launcher, folder, resources
        self.where = f'in [cluster.targets."{target}"] of {LOCAL}'
        self.job: Job | None = None
        self.killed = False
        self.read: Counter[str] = Counter()  # bytes of events and log that were taken in
        super().__init__(self._follow)

    def stop(self) -> None:
        """Ask for the state to be kept, and an end at the next step."""
        (self.folder / STOP).touch()

    def kill(self) -> None:
        self.killed = True
        self._cancel()

    def _cancel(self) -> None:
        if self.job is not None:
            self.job.cancel()

    def _follow(self, say: Callable[[dict[str, Any]], None]) -> None:
        try:
            say(self._end(say))
        except Exception as error:  # engines have errors of their own
            with suppress(Exception):
                self._cancel()  # nobody would follow it any more
            first = (str(error).splitlines() or [type(error).__name__])[0]
            hint = f"it asks for {self.resources}; other things can be asked for {self.where}"
            say({"event": "failed", "code": 4, "message": f"the cluster does not run it: {first}", "hint": hint})

    def _end(self, say: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        say({"event": "progress", "remark": f"asks for {self.resources}", "resources": self.resources._asdict()})
        end = self._attempt(say)
        for _ in range(RETRIES):
            if not isinstance(end, Ended) or end.why != LOST:
                break
            gone = f"its job is gone ({end.word}); begun again from the last kept state"
            say({"event": "progress", "remark": gone})
            end = self._attempt(say)
        return end if not isinstance(end, Ended) else self._given_up(end)

    def _given_up(self, end: Ended) -> dict[str, Any]:
        """Return what is said of a job that is not begun again."""
        if end.why != LOST:
            code, message, hint = FOR_GOOD[end.why]
            self._cancel()  # one that waits for what will not be
            said = hint.format(asked=self.resources, where=self.where)
            return {"event": "failed", "code": code, "message": message.format(word=end.word), "hint": said}
        log = f": {self.job.log}" if self.job and self.job.log else ""
        message = f"its job ended {RETRIES + 1} times without a word ({end.word})"
        return {"event": "failed", "code": 1, "message": message, "hint": f"the engine's log may say why{log}"}

    def _attempt(self, say: Callable[[dict[str, Any]], None]) -> dict[str, Any] | Ended:
        """Have a job run the order; return its last word, or how it ended without one."""
        (self.folder / BUILDER).touch()
        self.job = self.launcher.launch(self.folder, self.resources)
        return self._watched(self.job, say)

    def _watched(self, job: Job, say: Callable[[dict[str, Any]], None]) -> dict[str, Any] | Ended:
        """Pass on what a job says; return its last word, or how it ended without one."""
        over, stands = 0.0, ""
        while True:
            os.utime(self.folder / BUILDER)
            events = self._news()
            for line in self._printed():
                say({"event": "progress", "log": line})
            for event in events:
                if event["event"] in LAST:
                    return event
                say(event)
            if self.killed:
                self._cancel()  # it was being launched when that was wanted
                return {"event": "stopped"}
            if (ended := job.ended()) is None:
                over = 0.0
                if (now := job.stands()) and now != stands:
                    say({"event": "progress", "remark": now})
                    stands = now
            else:
                over = over or time.monotonic()
                if time.monotonic() - over > LAG:
                    return ended
            time.sleep(TICK)

    def _news(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._added(EVENTS)]

    def _printed(self) -> list[str]:
        """Return what the job has printed since the last look; of a bar that is drawn anew within a line its end."""
        lines = [line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace") for line in self._added(LOG)]
        shown = [hidden(line[:WIDTH]) for line in lines if line.strip()]
        left_out = len(shown) - LINES
        return [*shown[:LINES], f"… and {left_out} lines more"] if left_out > 0 else shown

    def _added(self, name: str) -> list[bytes]:
        """Return the whole lines by which a file of the folder has grown since the last look."""
        try:
            with (self.folder / name).open("rb") as file:
                file.seek(self.read[name])
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.read[name] += len(whole)
        return whole.split(b"\n")[:-1]


class Jobs:
    """A cluster: each order is a job of its engine. name: what the engine is called."""

    def __init__(self, launcher: Launcher, name: str) -> None:
        self.launcher, self.name = launcher, name

    def submit(self, order: Order, resources: Resources) -> SpoolHandle:
        folder = Path(order.work)
        publish_bytes(json.dumps(order.to_json()).encode(), folder / ORDER, folder, 0o644)
        return SpoolHandle(self.launcher, folder, order.target, resources)


def engine(where: str) -> tuple[str, str]:
    """Return the engine that `--on` names, and which one of it. Raises UsageError.

    where: `slurm`, `slurm:PARTITION`, `ray`, `ray:HOST:PORT`, `ray://HOST:PORT` (through Ray's client), or `processes`
    (as jobs of Slurm, but on this machine).
    """
    kind, _, rest = where.partition(":")
    if kind not in ("slurm", "processes", "ray"):
        raise UsageError(f"{where!r} is no cluster", hint="--on slurm, slurm:PARTITION, ray or ray://HOST:PORT")
    return kind, where if rest.startswith("//") else rest


def cluster(where: str, logs: Path) -> Cluster:
    """Return the cluster that `--on` names. logs: a folder for its engine's own. Raises UsageError, ResourceError."""
    kind, which = engine(where)
    launcher = RayLauncher(which or "auto") if kind == "ray" else SubmititLauncher(kind, which, logs)
    return Jobs(launcher, kind)
