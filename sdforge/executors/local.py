"""Worker processes on this machine, kept alive between the actions of one build."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdforge.order import Order
from sdforge.wire import Channel, pair

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "PYTHONUNBUFFERED": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait take nothing from those that compute
}
PATIENCE = 5.0  # seconds for an idle worker to end
VMSTAT = Path("/proc/vmstat")


def ended_for_memory() -> int:
    """Return how many processes this machine has ended for their memory since it was started; 0 where none tells."""
    with suppress(OSError):
        for line in VMSTAT.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


class LocalHandle:
    """One action on one worker."""

    def __init__(self, worker: LocalWorker, order: Order, log: str, lock: int) -> None:
        self.worker, self.order = worker, order
        self.over, self.ended_before = False, ended_for_memory()
        with suppress(ConnectionError):  # it has died meanwhile: `poll` says so
            worker.channel.send({"order": order.to_json(), "log": log}, (lock,) if lock >= 0 else ())

    def fileno(self) -> int:
        return self.worker.channel.fileno()

    def poll(self) -> list[dict[str, Any]]:
        events = []
        while not self.over and (received := self.worker.channel.receive(0)):
            events.append(received[0])
            if received[0]["event"] in ("done", "failed", "stopped", "damaged"):
                self.over = True
        if not self.over and self.worker.channel.closed:
            self.over = True
            events.append(self._lost(self.worker.process.wait()))
        return events

    def _lost(self, code: int) -> dict[str, Any]:
        """Return the event of a worker that died."""
        if code != -signal.SIGKILL or ended_for_memory() == self.ended_before:
            return {"event": "lost", "code": code}
        message = f"the system ended the worker of {self.order.target}, as memory ran out"
        hint = self.order.with_less() or "end other programs; the same command goes on from what is kept"
        return {"event": "failed", "code": 4, "message": message, "hint": hint}

    def stop(self) -> None:
        with suppress(OSError):
            self.worker.channel.send({"stop": True})

    def kill(self) -> None:
        self.worker.process.kill()


class LocalWorker:
    """One worker process. expecting: whether it has what most orders need ready before there is one."""

    def __init__(self, threads: int, *, expecting: bool = False) -> None:
        ours, theirs = pair()
        self.used = not expecting
        environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
        # a session of its own: Ctrl-C in the terminal reaches the builder alone, which tells the worker what to do
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sdforge.run", "--socket", str(theirs.fileno()), *["--expecting"] * expecting],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        self.channel = Channel(ours)

    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        self.channel.close()
        if not self.used:  # it may be reading libraries still
            self.process.kill()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class LocalExecutor:
    """As many workers as actions run side by side."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.workers: list[LocalWorker] = []
        self.busy: list[LocalHandle] = []

    def expect(self) -> None:
        if not self.workers:
            self.workers.append(LocalWorker(self.threads, expecting=True))

    def submit(self, order: Order, log: str, lock: int) -> LocalHandle:
        self.busy = [handle for handle in self.busy if not handle.over]
        taken = {id(handle.worker) for handle in self.busy}
        self.workers = [worker for worker in self.workers if worker.alive() and not worker.channel.closed]
        free = [worker for worker in self.workers if id(worker) not in taken]
        worker = free[0] if free else LocalWorker(self.threads)
        if not free:
            self.workers.append(worker)
        worker.used = True
        handle = LocalHandle(worker, order, log, lock)
        self.busy.append(handle)
        return handle

    def close(self) -> None:
        for worker in self.workers:
            worker.end()
        self.workers = []
