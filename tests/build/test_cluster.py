"""Trainings as jobs of an engine: the same bytes, followed and stopped from here, begun again when a job is lost."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests.build.one_training import Wait, begin
from tests.conftest import Project

pytest.importorskip("submitit")


def job_of(project: Project) -> int:
    """The process of a job of submitit's that works in this project's cache."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            inside = str(project.root).encode() in b" ".join(words)
        except OSError:
            continue
        if inside and b"submitit.core._submit" in words:
            found.append(int(folder.name))
    return found[0] if found else 0


def test_a_job_makes_what_this_machine_would(fresh: Project, uninterrupted: Project) -> None:
    ran = fresh.build("--on", "processes")
    assert ran.built == ["a", "preset.export"]
    assert [e["loss"] for e in ran.of("progress") if "loss" in e]
    assert fresh.output.read_bytes() == uninterrupted.output.read_bytes()
    assert fresh.lock == uninterrupted.lock


def test_what_a_job_prints_is_shown_while_it_runs(fresh: Project, wait_for: Wait) -> None:
    fresh.environment["REHEARSAL_PRINTS"] = "\x1b[1mepoch"
    command = begin(fresh, wait_for, "--on", "processes")
    assert command.stdout
    said = []
    while not said or "epoch 4" not in said[-1]:  # the job waits at step 5
        said.append(command.stdout.readline())
        assert said[-1], "the build has ended"
    shown = [line.strip() for line in said if "epoch" in line]
    assert shown == [f"a | �[1mepoch {step}" for step in range(5)]
    shutil.rmtree(fresh.root / "gate")
    out, err = command.communicate(timeout=60)
    assert command.returncode == 0, err
    assert [line.strip() for line in out.splitlines() if "epoch" in line] == [
        f"a | �[1mepoch {n}" for n in range(5, 10)
    ]


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGKILL], ids=["preempted", "killed"])
def test_a_job_that_is_lost_is_begun_again_from_its_last_state(
    fresh: Project, uninterrupted: Project, wait_for: Wait, number: int
) -> None:
    command = begin(fresh, wait_for, "--on", "processes")
    job = job_of(fresh)
    os.kill(job, number)
    wait_for(lambda: not Path(f"/proc/{job}").exists())
    shutil.rmtree(fresh.root / "gate")
    out, err = command.communicate(timeout=60)
    assert command.returncode == 0, out + err
    # a preempted job is put into the queue again by its engine, a dead one by us
    assert ("begun again from the last kept state" in out) == (number == signal.SIGKILL)
    assert "going on from step 4" in out
    assert fresh.output.read_bytes() == uninterrupted.output.read_bytes()


def test_an_interrupt_here_keeps_the_state_there(fresh: Project, uninterrupted: Project, wait_for: Wait) -> None:
    command = begin(fresh, wait_for, "--on", "processes")
    command.send_signal(signal.SIGINT)
    out, err = command.communicate(timeout=60)
    assert command.returncode == 130, out + err
    assert "the state of toy:a is kept" in err
    shutil.rmtree(fresh.root / "gate")
    assert "going on from step 5" in fresh.forge("build", "--plain").out
    assert fresh.output.read_bytes() == uninterrupted.output.read_bytes()


def test_what_a_job_says_of_its_failure_is_said_here(fresh: Project) -> None:
    fresh.edit('dataset = "drawings"', 'dataset = "drawings"\nfails = true')
    said = fresh.forge("build", "--on", "processes", code=1)
    assert "the rehearsal was told to fail" in said.out


@pytest.mark.parametrize(
    ("where", "code", "words"), [("k8s", 2, "is no cluster"), ("slurm", 4, "Slurm is not to be had here")]
)
def test_a_cluster_that_is_none_is_said_before_anything_runs(fresh: Project, where: str, code: int, words: str) -> None:
    # whether Slurm is installed on the machine that runs this is no matter
    said = fresh.forge("build", "--on", where, code=code, PATH=str(Path(sys.executable).parent))
    assert words in said.err
    assert fresh.trained() == []
