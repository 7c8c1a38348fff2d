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
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from sdforge.errors import ResourceError, UsageError
from sdforge.executors import Handle
from sdforge.executors.beside import Beside
from sdforge.executors.local import ENVIRONMENT, LocalExecutor
from sdforge.order import Order
from sdforge.places import amount
from sdforge.run.spool import BUILDER, EVENTS, ORDER, STOP, serve
from sdforge.store.files import publish_bytes

TICK = 0.5  # seconds between looks
LAG = 5.0  # seconds in which what a job wrote last arrives over a network's file system
RETRIES = 3
LAST = ("done", "failed", "stopped", "damaged")


class Job(Protocol):
    """A job of an engine."""

    def over(self) -> bool:
        """Say whether it has ended, however that may be."""
        ...

    def cancel(self) -> None:
        """End it."""
        ...


class Launcher(Protocol):
    """An engine."""

    def launch(self, folder: Path) -> Job:
        """Have the order in a folder run. Raises ResourceError."""
        ...


def run_folder(folder: str) -> None:
    """What a job does: run the order in a folder."""
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    serve(folder)


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
            say({"event": "failed", "code": 4, "message": f"the cluster does not run it: {first}", "hint": ""})

    def _end(self, say: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        for attempt in range(RETRIES + 1):
            if attempt:
                say({"event": "progress", "again": "its job is gone; begun again from the last kept state"})
            (self.folder / BUILDER).touch()
            self.job = self.launcher.launch(self.folder)
            if (end := self._watched(self.job, say)) is not None:
                return end
        message = f"its job ended {RETRIES + 1} times without a word"
        return {"event": "failed", "code": 1, "message": message, "hint": "the engine's own log may say why"}

    def _watched(self, job: Job, say: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        """Pass on what a job says; return its last word, or None if it ends without one."""
        over = 0.0
        while True:
            os.utime(self.folder / BUILDER)
            for event in self._news():
                if event["event"] in LAST:
                    return event
                say(event)
            if self.killed:
                return {"event": "stopped"}
            if job.over():
                over = over or time.monotonic()
                if time.monotonic() - over > LAG:
                    return None
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


def _library(name: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise UsageError(f"--on needs the library {name}", hint=f'pip install "sdforge[{extra}]"') from None


# -- Slurm -------------------------------------------------------------------------------------------------------------


class Task:
    """What submitit runs; when a job is preempted, it is put into the queue again as it is."""

    def __call__(self, folder: str) -> None:
        run_folder(folder)

    def checkpoint(self, folder: str) -> Any:
        return import_module("submitit.helpers").DelayedSubmission(self, folder)


class SubmititJob:
    """A job of submitit's."""

    def __init__(self, job: Any) -> None:
        self.job = job

    def over(self) -> bool:
        return bool(self.job.done())

    def cancel(self) -> None:
        self.job.cancel(check=False)


class SubmititLauncher:
    """Slurm, or processes of this machine that submitit treats alike."""

    def __init__(self, kind: str, partition: str, resources: dict[str, Any], logs: Path) -> None:
        library = _library("submitit", "slurm")
        try:
            self.executor: Any = library.AutoExecutor(folder=logs, cluster="local" if kind == "processes" else "slurm")
        except RuntimeError as error:
            raise ResourceError(f"Slurm is not to be had here: {error}", hint="run forge where sbatch is") from None
        wanted = amount(resources["memory"])
        self.executor.update_parameters(
            name="forge",
            timeout_min=resources["minutes"],
            cpus_per_task=resources["cpus"],
            gpus_per_node=resources["gpus"],
            **({"mem_gb": wanted / 10**9} if wanted else {}),
            **({"slurm_partition": partition} if partition and kind == "slurm" else {}),
        )

    def launch(self, folder: Path) -> SubmititJob:
        return SubmititJob(self.executor.submit(Task(), str(folder)))


# -- Ray ---------------------------------------------------------------------------------------------------------------


class RayJob:
    """A task of a Ray cluster."""

    def __init__(self, ray: Any, reference: Any) -> None:
        self.ray, self.reference = ray, reference

    def over(self) -> bool:
        ready, _ = self.ray.wait([self.reference], timeout=0)
        return bool(ready)

    def cancel(self) -> None:
        self.ray.cancel(self.reference, force=True)


class RayLauncher:
    """A Ray cluster that runs already."""

    def __init__(self, address: str, resources: dict[str, Any]) -> None:
        self.ray = _library("ray", "cluster")
        try:
            self.ray.init(address=address, log_to_driver=False, logging_level="error", ignore_reinit_error=True)
        except (ConnectionError, ValueError, RuntimeError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise ResourceError(f"no Ray cluster answers at {address}: {first}", hint="`ray start --head`") from None
        wanted = amount(resources["memory"])
        wishes = {"num_cpus": resources["cpus"], "num_gpus": resources["gpus"], "max_retries": 0}
        self.task: Any = self.ray.remote(**wishes, **({"memory": wanted} if wanted else {}))(run_folder)

    def launch(self, folder: Path) -> RayJob:
        return RayJob(self.ray, self.task.remote(str(folder)))
