"""Trainings on a real Slurm of two nodes: the same bytes, also where it takes a job's node away.

`pytest -m slow tests/build/test_slurm.py`, where munge and Slurm's daemons are installed (Debian: munge, slurm-wlm).
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator

import pytest

from tests.build.one_training import Wait, begin
from tests.conftest import Project
from tests.slurm import Slurm, missing, slurm

pytest.importorskip("submitit")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=f"there is no {missing()}")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture
def fresh(fresh: Project, cluster: Slurm, wait_for: Wait) -> Project:
    """The project, and a Slurm that has nothing left to do."""
    wait_for(cluster.is_idle)
    fresh.environment = cluster.environment
    return fresh


def test_a_job_asks_for_what_the_project_says(
    fresh: Project, uninterrupted: Project, cluster: Slurm, wait_for: Wait
) -> None:
    fresh.edit("gpus = 0", "gpus = 1", "forge.local.toml")
    command = begin(fresh, wait_for, "--on", "slurm")
    job = cluster.ask("scontrol", "show", "job", cluster.job("RUNNING"))
    assert "TimeLimit=00:30:00" in job
    assert "MinMemoryNode=1G" in job
    assert "TresPerNode=gres:gpu:1" in job
    assert "NodeList=n1" in job  # the one that has a GPU
    shutil.rmtree(fresh.root / "gate")
    out, err = command.communicate(timeout=60)
    assert command.returncode == 0, out + err
    assert "sacct" not in out + err
    assert fresh.output.read_bytes() == uninterrupted.output.read_bytes()
    assert fresh.lock == uninterrupted.lock


@pytest.mark.parametrize("how", ["preempted", "requeued", "its node is lost"])
def test_a_job_whose_node_is_taken_goes_on_from_its_last_state(
    fresh: Project, uninterrupted: Project, cluster: Slurm, wait_for: Wait, how: str
) -> None:
    command = begin(fresh, wait_for, "--on", "slurm")
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
    assert fresh.output.read_bytes() == uninterrupted.output.read_bytes()
    assert fresh.lock == uninterrupted.lock
    if node not in cluster.nodes:
        cluster.begin_node(node)


def test_a_job_that_somebody_cancels_is_not_begun_again(
    fresh: Project, uninterrupted: Project, cluster: Slurm, wait_for: Wait
) -> None:
    command = begin(fresh, wait_for, "--on", "slurm")
    cluster.ask("scancel", cluster.job("RUNNING"))
    out, _ = command.communicate(timeout=120)
    assert command.returncode == 1
    assert "its job ended: CANCELLED" in out
    shutil.rmtree(fresh.root / "gate")
    assert "going on from step 4" in fresh.forge("build", "--plain", "--on", "slurm").out
    assert fresh.output.read_bytes() == uninterrupted.output.read_bytes()


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
