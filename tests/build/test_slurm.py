"""Trainings on a real Slurm of two nodes: the same bytes, also where it takes a job's node away.

`pytest -m slow tests/build/test_slurm.py`, where munge and Slurm's daemons are installed (Debian: munge, slurm-wlm).
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.build.test_interrupts import RECIPE, Wait
from tests.conftest import Project, new_project
from tests.slurm import Slurm, missing, slurm

pytest.importorskip("submitit")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=f"there is no {missing()}")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Path) -> Project:
    """The project as this machine builds it."""
    project = new_project(tmp_path_factory.mktemp("whole") / "project", toy_checkpoint, RECIPE)
    (project.root / "forge.local.toml").write_text('[cluster]\ngpus = 0\ncpus = 1\nmemory = "1GiB"\nminutes = 30\n')
    project.build()
    return project


@pytest.fixture
def fresh(whole: Project, cluster: Slurm, tmp_path: Path, wait_for: Wait) -> Project:
    """The same with a cache of its own, no pins, and a Slurm that has nothing left to do."""
    wait_for(cluster.is_idle)
    project = whole.clone(tmp_path / "project")
    (project.root / "forge.lock").unlink()
    project.environment = cluster.environment
    return project


def begin(project: Project, wait_for: Wait) -> subprocess.Popen[str]:
    """Start a build whose job waits at step 5, with the state of step 4 published."""
    gate = project.root / "gate"
    gate.mkdir()
    command = project.start("build", "--plain", "--on", "slurm", REHEARSAL_GATE=str(gate), REHEARSAL_AT="5")
    wait_for(lambda: (gate / "toy-a").exists())
    return command


def test_a_job_asks_for_what_the_project_says(fresh: Project, whole: Project, cluster: Slurm, wait_for: Wait) -> None:
    fresh.edit("gpus = 0", "gpus = 1", "forge.local.toml")
    command = begin(fresh, wait_for)
    job = cluster.ask("scontrol", "show", "job", cluster.job("RUNNING"))
    assert "TimeLimit=00:30:00" in job
    assert "MinMemoryNode=1G" in job
    assert "TresPerNode=gres:gpu:1" in job
    assert "NodeList=n1" in job  # the one that has a GPU
    shutil.rmtree(fresh.root / "gate")
    out, err = command.communicate(timeout=60)
    assert command.returncode == 0, out + err
    assert "sacct" not in out + err
    assert fresh.output.read_bytes() == whole.output.read_bytes()
    assert fresh.lock == whole.lock


@pytest.mark.parametrize("how", ["preempted", "requeued", "its node is lost"])
def test_a_job_whose_node_is_taken_goes_on_from_its_last_state(
    fresh: Project, whole: Project, cluster: Slurm, wait_for: Wait, how: str
) -> None:
    command = begin(fresh, wait_for)
    job = cluster.job("RUNNING")
    node = cluster.ask("squeue", "--noheader", "--format=%N", f"--jobs={job}")
    if how == "preempted":
        cluster.ask("sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 5")
    elif how == "requeued":
        cluster.ask("scontrol", "requeue", job)
    else:
        cluster.lose_node(node)
    if how != "its node is lost":  # of which Slurm knows only when its daemon has not answered for long
        wait_for(lambda: cluster.job("PENDING") == job)
    shutil.rmtree(fresh.root / "gate")
    out, err = command.communicate(timeout=180)
    assert command.returncode == 0, out + err
    assert "going on from step 4" in out
    assert fresh.output.read_bytes() == whole.output.read_bytes()
    assert fresh.lock == whole.lock
    if node not in cluster.nodes:
        cluster.begin_node(node)


def test_a_job_that_somebody_cancels_is_not_begun_again(
    fresh: Project, whole: Project, cluster: Slurm, wait_for: Wait
) -> None:
    command = begin(fresh, wait_for)
    cluster.ask("scancel", cluster.job("RUNNING"))
    out, _ = command.communicate(timeout=120)
    assert command.returncode == 1
    assert "its job ended: CANCELLED" in out
    shutil.rmtree(fresh.root / "gate")
    assert "going on from step 4" in fresh.forge("build", "--plain", "--on", "slurm").out
    assert fresh.output.read_bytes() == whole.output.read_bytes()


def test_an_interrupt_takes_a_waiting_job_out_of_the_queue(fresh: Project, cluster: Slurm, wait_for: Wait) -> None:
    cluster.ask("scontrol", "update", "nodename=n1,n2", "state=drain", "reason=test")
    try:
        command = fresh.start("build", "--plain", "--on", "slurm")
        wait_for(lambda: cluster.job("PENDING"))
        command.send_signal(signal.SIGINT)
        out, err = command.communicate(timeout=60)
    finally:
        cluster.ask("scontrol", "update", "nodename=n1,n2", "state=resume")
    assert command.returncode == 130, out + err
    assert not cluster.job("PENDING,RUNNING")


def test_what_slurm_refuses_is_said(fresh: Project) -> None:
    fresh.edit("1GiB", "900GiB", "forge.local.toml")
    said = fresh.forge("build", "--plain", "--on", "slurm", code=4)
    assert "Memory specification can not be satisfied" in said.out
    assert "[cluster] in forge.toml or forge.local.toml" in said.out
