"""Trainings and previews on other machines, by engines that people run already: a Ray cluster, or Slurm by submitit.

All machines see the cache under the same path (`FORGE_CACHE`), so orders, results and train states need no way of their
own. Merges, edits and exports, which are over in seconds, run here. A job that ends without a word, since its node died
or was preempted, is begun again, and goes on from its last kept state.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdforge.errors import UsageError
from sdforge.executors import Handle
from sdforge.executors.beside import Beside
from sdforge.executors.jobs import Ended, Job, Launcher
from sdforge.executors.local import LocalExecutor
from sdforge.executors.ray import RayLauncher
from sdforge.executors.slurm import SubmititLauncher
from sdforge.order import Order
from sdforge.run.spool import BUILDER, EVENTS, ORDER, STOP
from sdforge.store.files import publish_bytes

TICK = 0.5  # seconds between looks
LAG = 5.0  # seconds in which what a job wrote last arrives over a network's file system
RETRIES = 3
LAST = ("done", "failed", "stopped", "damaged")


class SpoolHandle(Beside):
    """An action on another machine, followed through its folder."""

    def __init__(self, launcher: Launcher, folder: Path) -> None:
        self.launcher, self.folder = launcher, folder
        self.job: Job | None = None
        self.killed = False
        self.read = 0  # bytes of the events that were taken in
        super().__init__(self._follow)

    def stop(self) -> None:
        """Ask for the state to be kept, and an end at the next step."""
        (self.folder / STOP).touch()

    def kill(self) -> None:
        self.killed = True
        if self.job is not None:
            self.job.cancel()

    def _follow(self, say: Callable[[dict[str, Any]], None]) -> None:
        try:
            say(self._end(say))
        except Exception as error:  # engines have errors of their own
            first = (str(error).splitlines() or [type(error).__name__])[0]
            hint = "[cluster] in forge.toml or forge.local.toml says what a job asks for"
            say({"event": "failed", "code": 4, "message": f"the cluster does not run it: {first}", "hint": hint})

    def _end(self, say: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        end = self._attempt(say)
        for _ in range(RETRIES):
            if not isinstance(end, Ended) or end.code:
                break
            gone = f"its job is gone ({end.word}); begun again from the last kept state"
            say({"event": "progress", "remark": gone})
            end = self._attempt(say)
        return end if not isinstance(end, Ended) else self._given_up(end)

    def _given_up(self, end: Ended) -> dict[str, Any]:
        """Return what is said of a job that is not begun again."""
        if end.code:
            return {"event": "failed", "code": end.code, "message": f"its job ended: {end.word}", "hint": end.hint}
        log = f": {self.job.log}" if self.job and self.job.log else ""
        message = f"its job ended {RETRIES + 1} times without a word ({end.word})"
        return {"event": "failed", "code": 1, "message": message, "hint": f"the engine's log may say why{log}"}

    def _attempt(self, say: Callable[[dict[str, Any]], None]) -> dict[str, Any] | Ended:
        """Have a job run the order; return its last word, or how it ended without one."""
        (self.folder / BUILDER).touch()
        self.job = self.launcher.launch(self.folder)
        return self._watched(self.job, say)

    def _watched(self, job: Job, say: Callable[[dict[str, Any]], None]) -> dict[str, Any] | Ended:
        """Pass on what a job says; return its last word, or how it ended without one."""
        over, stands = 0.0, ""
        while True:
            os.utime(self.folder / BUILDER)
            for event in self._news():
                if event["event"] in LAST:
                    return event
                say(event)
            if self.killed:
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
        try:
            with (self.folder / EVENTS).open("rb") as file:
                file.seek(self.read)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


class ClusterExecutor:
    """Long actions on a cluster, short ones here. elsewhere: what the cluster is called."""

    def __init__(self, launcher: Launcher, threads: int, elsewhere: str) -> None:
        self.launcher, self.here, self.elsewhere = launcher, LocalExecutor(threads), elsewhere

    def submit(self, order: Order, log: str, lock: int) -> Handle:
        if order.group != "trainings" and order.method != "previews":
            return self.here.submit(order, log, lock)
        folder = Path(order.work)
        publish_bytes(json.dumps(order.to_json()).encode(), folder / ORDER, folder, 0o644)
        return SpoolHandle(self.launcher, folder)

    def close(self) -> None:
        self.here.close()


def cluster(where: str, resources: dict[str, Any], threads: int, logs: Path) -> ClusterExecutor:
    """Return the executor that `--on` names. Raises UsageError, ResourceError.

    where: `slurm`, `slurm:PARTITION`, `ray`, `ray:HOST:PORT`, `ray://HOST:PORT` (through Ray's client), or `processes`
    (as jobs of Slurm, but on this machine).
    resources: of a job, as `[cluster]` has them; logs: a folder for the engine's own.
    """
    kind, _, rest = where.partition(":")
    if kind in ("slurm", "processes"):
        return ClusterExecutor(SubmititLauncher(kind, rest, resources, logs), threads, kind)
    if kind == "ray":
        address = where if rest.startswith("//") else rest or "auto"
        return ClusterExecutor(RayLauncher(address, resources), threads, kind)
    raise UsageError(f"{where!r} is no cluster", hint="--on slurm, slurm:PARTITION, ray or ray://HOST:PORT")
