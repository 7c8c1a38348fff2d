"""Whoever should read what is written is gone: the worker of an action, or the reader of what a command says."""

from __future__ import annotations

import select
import signal
import sys
from pathlib import Path

import pytest

import sdforge.devices as devices
from sdforge.devices import device_lock
from sdforge.executors.local import LocalExecutor, LocalHandle, LocalWorker
from sdforge.order import Order
from tests.conftest import Project


def test_a_worker_that_dies_before_it_has_its_order_is_lost_and_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    worker = LocalWorker(1)
    worker.process.wait(10)
    order = Order("a", "toy:a", "rehearsal", "trainings", "sd15", {}, "/nowhere", {})
    handle = LocalHandle(worker, order, "", -1)
    assert handle.poll() == [{"event": "lost", "code": 1}]
    handle.stop()
    worker.end()


def test_a_worker_that_is_expecting_takes_the_next_order_and_keeps_nobody_waiting_without_one(tmp_path: Path) -> None:
    executor = LocalExecutor(1)
    executor.expect()
    executor.expect()
    (worker,) = executor.workers
    (tmp_path / "work").mkdir()
    order = Order("a", "toy:a", "nobodys", "edits", "sd15", {}, str(tmp_path / "work"), {})
    handle = executor.submit(order, str(tmp_path / "log"), -1)
    assert handle.worker is worker
    while not (events := handle.poll()):
        select.select([handle], [], [], 60)
    assert events[0]["event"] == "failed"
    executor.close()
    assert worker.process.wait(10) == 0  # which heard it
    executor.expect()
    (worker,) = executor.workers
    executor.close()
    assert worker.process.wait(10) == -signal.SIGKILL  # which was reading libraries


def test_a_build_that_nobody_listens_to_is_not_said_to_be_done(project: Project) -> None:
    process = project.start("build", "--plain")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(60) == 141  # as of a program that SIGPIPE ends
    assert process.stderr.read() == ""
    assert not project.output.exists()


@pytest.mark.parametrize(
    ("nodes", "visible", "shown"),
    [
        (["nvidia0", "nvidia1", "nvidiactl", "nvidia-caps"], None, ["0", "1"]),
        (["nvidia0", "nvidia1"], "1", ["1"]),
        (["nvidia0", "nvidia1"], "-1", []),
        (["nvidia0", "nvidia1"], "", []),
        (["nvidia0", "nvidia1"], "1,7,0", ["1"]),
        (["nvidia0"], "GPU-8932f937-d72c", ["GPU-8932f937-d72c"]),
        ([], "0", []),
        (["dxg"], "0", ["0"]),
    ],
)
def test_devices_are_those_that_cuda_shows(
    nodes: list[str], visible: str | None, shown: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in nodes:
        (tmp_path / name).touch()
    monkeypatch.setattr(devices, "DEVICES", tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.devices("auto") == ([f"cuda:{i}" for i in range(len(shown))] or ["cpu"])
    locked = [device_lock(f"cuda:{i}").path.stem for i in range(len(shown))]
    assert locked == [f"cuda-{name}" for name in shown]  # two builds that see one GPU each do not wait for each other
