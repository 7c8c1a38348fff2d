"""A machine whose memory runs out: exit code 4, a way out, and the next build goes on to the same bytes."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdforge.cli import unforeseen
from sdforge.errors import ResourceError
from sdforge.executors import local
from sdforge.order import Order
from tests.build.one_training import Wait, begin
from tests.build.test_interrupts import children, finish
from tests.conftest import Project

GROUPS = Path("/sys/fs/cgroup")
ALLOWED = 512 << 20  # bytes that a worker may take
HUNGER = 1 << 30  # bytes that it wants


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group whose processes may take `ALLOWED` bytes of this machine's memory."""
    version1 = (GROUPS / "memory").is_dir()
    folder = (GROUPS / "memory" if version1 else GROUPS) / f"forge-test-{os.getpid()}"
    limit = "memory.limit_in_bytes" if version1 else "memory.max"
    try:
        folder.mkdir()
        (folder / limit).write_text(str(ALLOWED))
    except OSError as error:
        if folder.is_dir():
            folder.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    yield folder
    folder.rmdir()


def hungry(project: Project, wait_for: Wait) -> tuple[subprocess.Popen[str], int]:
    """Start a build whose worker, returned too, waits at step 5, and takes much memory there."""
    project.environment["REHEARSAL_HUNGER"] = str(HUNGER)
    command = begin(project, wait_for)
    (worker,) = children(command.pid)
    return command, worker


def fed(project: Project, command: subprocess.Popen[str]) -> str:
    """Let the worker go on, and return what is said of its end."""
    (project.root / "gate/go").touch()
    out, err = command.communicate(timeout=60)
    assert command.returncode == 4, out + err
    assert "Traceback" not in out + err
    del project.environment["REHEARSAL_HUNGER"]
    return out + err


def test_a_worker_that_gets_no_more_memory_says_so(fresh: Project, uninterrupted: Project, wait_for: Wait) -> None:
    command, worker = hungry(fresh, wait_for)
    resource.prlimit(worker, resource.RLIMIT_AS, (ALLOWED, ALLOWED))
    said = fed(fresh, command)
    assert "this machine is out of memory" in said
    assert "what was built is kept" in said
    finish(fresh, uninterrupted, 4)


def test_a_worker_that_the_system_ends_for_its_memory_is_told_from_one_that_somebody_killed(
    fresh: Project, uninterrupted: Project, wait_for: Wait, group: Path
) -> None:
    command, worker = hungry(fresh, wait_for)
    (group / "cgroup.procs").write_text(str(worker))
    said = fed(fresh, command)
    assert "the system ended the worker of toy:a, as memory ran out" in said
    assert "--vram 8GB (or what there is) computes the same in smaller parts, from the last kept state on" in said
    finish(fresh, uninterrupted, 4)


class Died:
    """A worker that is gone."""

    closed = True

    def __init__(self, code: int) -> None:
        self.code, self.channel, self.process = code, self, self

    def send(self, *_: Any) -> None:
        """Nobody hears it."""

    def receive(self, _: float) -> None:
        """There is nothing to come."""

    def wait(self) -> int:
        return self.code


@pytest.mark.parametrize(
    ("code", "counted", "said"),
    [(-9, "4", "failed"), (-9, "3", "lost"), (-9, "", "lost"), (-15, "4", "lost"), (1, "4", "lost")],
)
def test_a_worker_counts_as_ended_for_its_memory_where_the_system_counts_one_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, counted: str, said: str
) -> None:
    table = tmp_path / "vmstat"
    monkeypatch.setattr(local, "VMSTAT", table)
    if counted:  # not every system tells
        table.write_text("nr_free_pages 7\noom_kill 3\n")
    order = Order("key", "r:style", "lora", "trainings", "sd15", {"batch": 4}, str(tmp_path))
    handle = local.LocalHandle(Died(code), order, "", -1)  # type: ignore[arg-type]
    if counted:
        table.write_text(f"nr_free_pages 7\noom_kill {counted}\n")
    (event,) = handle.poll()
    assert event["event"] == said
    if said == "failed":
        assert event["code"] == 4
        assert "--vram 8GB" in event["hint"]


def test_a_command_itself_may_get_no_more_memory(tmp_path: Path) -> None:
    error = unforeseen(MemoryError(), tmp_path)
    assert isinstance(error, ResourceError)
    assert error.message == "this machine is out of memory"
    assert not (tmp_path / ".forge").exists()
