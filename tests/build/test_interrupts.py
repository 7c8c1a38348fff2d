"""Trainings that are interrupted go on from their last state and end with the same bits."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.build.one_training import Wait, begin
from tests.conftest import Project

STEPS = 10

pytestmark = pytest.mark.usefixtures("forked")  # what is interrupted is a real command


def children(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def held(project: Project, wait_for: Wait) -> tuple[subprocess.Popen[str], int]:
    """Start a build whose worker, returned too, waits at step 5."""
    command = begin(project, wait_for)
    (worker,) = children(command.pid)
    return command, worker


def finish(project: Project, whole: Project, begun_at: int) -> None:
    """Build again: the rest of the steps runs, and the result is that of a training that nobody interrupted."""
    shutil.rmtree(project.root / "gate", ignore_errors=True)
    project.trained()
    ran = project.forge("build", "--plain")
    assert f"going on from step {begun_at}" in ran.out
    steps = [line for line in project.trained() if line.startswith("step")]
    assert len(steps) == STEPS - begun_at
    assert project.output.read_bytes() == whole.output.read_bytes()
    assert project.lock == whole.lock
    assert project.build().built == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_keeps_the_state(
    fresh: Project, uninterrupted: Project, wait_for: Wait, number: int, code: int
) -> None:
    command, worker = held(fresh, wait_for)
    os.kill(command.pid, number)
    out, err = command.communicate(timeout=30)
    assert command.returncode == code, out + err
    assert "the state of toy:a is kept" in err
    assert "Traceback" not in out + err
    wait_for(lambda: not is_alive(worker))
    assert "it has never been made here; goes on from step 5" in fresh.forge("plan").out
    finish(fresh, uninterrupted, 5)


def test_a_killed_command_leaves_a_worker_that_keeps_its_state_and_ends(
    fresh: Project, uninterrupted: Project, wait_for: Wait
) -> None:
    command, worker = held(fresh, wait_for)
    os.kill(command.pid, signal.SIGKILL)
    command.communicate()
    wait_for(lambda: not is_alive(worker))
    finish(fresh, uninterrupted, 5)


def test_a_build_waits_for_the_worker_that_a_killed_command_left(
    fresh: Project, uninterrupted: Project, wait_for: Wait
) -> None:
    command, worker = held(fresh, wait_for)
    os.kill(worker, signal.SIGSTOP)
    os.kill(command.pid, signal.SIGKILL)
    command.communicate()
    second = fresh.start("build", "--json")
    said = ""
    while '"state": "waiting"' not in said:
        assert second.stdout
        said += second.stdout.readline()
    os.kill(worker, signal.SIGCONT)
    second.communicate(timeout=60)
    assert second.returncode == 0
    steps = [line for line in fresh.trained() if line.startswith("step")]
    assert len(steps) == len(set(steps)) == STEPS
    assert fresh.output.read_bytes() == uninterrupted.output.read_bytes()


def test_a_killed_worker_fails_the_action_and_the_next_build_goes_on(
    fresh: Project, uninterrupted: Project, wait_for: Wait
) -> None:
    command, worker = held(fresh, wait_for)
    os.kill(worker, signal.SIGKILL)
    out, err = command.communicate(timeout=30)
    assert command.returncode == 1, err
    assert "the worker of toy:a died (SIGKILL" in out
    assert "what was built is kept" in out
    finish(fresh, uninterrupted, 4)


def test_both_killed_at_once(fresh: Project, uninterrupted: Project, wait_for: Wait) -> None:
    command, worker = held(fresh, wait_for)
    os.kill(worker, signal.SIGKILL)
    os.kill(command.pid, signal.SIGKILL)
    command.communicate()
    finish(fresh, uninterrupted, 4)


def test_a_kill_while_a_state_is_published_costs_that_state_alone(fresh: Project, uninterrupted: Project) -> None:
    fresh.forge("plan")  # so that the command itself has nothing to publish before the training is done
    # the worker publishes tensors and description of step 2, tensors of step 4, and then it dies
    command = fresh.start("build", "--plain", FORGE_FAULT="kill:4")
    command.communicate(timeout=60)
    assert command.returncode == 1
    assert "state toy:a 4" not in fresh.trained()
    finish(fresh, uninterrupted, 2)


@pytest.mark.parametrize("at", range(1, 13))
def test_a_kill_at_any_publish_loses_nothing(fresh: Project, uninterrupted: Project, at: int) -> None:
    command = fresh.start("build", "--plain", FORGE_FAULT=f"kill:{at}")
    command.communicate(timeout=60)
    assert command.returncode != 0 or at > 8
    fresh.build()
    assert fresh.output.read_bytes() == uninterrupted.output.read_bytes()
    assert fresh.lock == uninterrupted.lock
    assert fresh.build().built == []


def test_a_damaged_state_is_passed_over(fresh: Project, uninterrupted: Project, wait_for: Wait) -> None:
    command, worker = held(fresh, wait_for)
    os.kill(worker, signal.SIGKILL)
    command.communicate(timeout=30)
    (state,) = (fresh.root / "cache/v1/states").rglob("4.safetensors")
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.chmod(0o644)
    state.write_bytes(data)
    finish(fresh, uninterrupted, 2)


def test_more_steps_go_on_from_what_was_trained(fresh: Project) -> None:
    fresh.build()
    fresh.trained()
    fresh.edit('dataset = "drawings"', 'dataset = "drawings"\nsteps = 14')
    fresh.build()
    assert [line for line in fresh.trained() if line.startswith("step")] == [f"step toy:a {i}" for i in range(8, 14)]
    other = fresh.clone(fresh.root.with_name("other"))
    (other.root / "forge.lock").unlink()
    other.build()
    assert other.output.read_bytes() == fresh.output.read_bytes()
