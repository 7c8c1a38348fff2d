"""Trainings on a real Slurm of two nodes: the same bytes, also where it takes a job's node away.

`pytest -m slow tests/build/test_slurm.py`, where munge and Slurm's daemons are installed (Debian: munge, slurm-wlm).
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator

import pytest

from tests.build.one_training import RECIPE, Wait, begin
from tests.conftest import Project
from tests.slurm import Slurm, missing, slurm

pytest.importorskip("submitit")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=f"there is no {missing()}")]


OTHERS = """
[cluster.formulas]
here = false
cpus = 2

[cluster.targets."toy:b"]
gpus = 1
cpus = 2
memory = "4GiB"
minutes = 20
partition = "urgent"
"""
MORE = """
[rehearsal.b]
on = "base"
dataset = "drawings"
rank = 4

[cast.whole]
checkpoint = "a"
dtype = "fp32"
"""


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
    fresh.edit("gpus = 0\ncpus = 1", "gpus = 1\ncpus = 2", "forge.local.toml")
    command = begin(fresh, wait_for, "--on", "slurm")
    number = cluster.job("RUNNING")
    job = cluster.ask("scontrol", "show", "job", number)
    assert "TimeLimit=00:30:00" in job
    assert "MinMemoryNode=1G" in job
    assert "NumCPUs=2" in job
    assert "TresPerNode=gres:gpu:1" in job
    assert "NodeList=n1" in job  # the one that has a GPU
    assert "cpu=2" in cluster.ask("scontrol", "show", "step", f"{number}.0")  # of which the training itself has all
    shutil.rmtree(fresh.root / "gate")
    out, err = command.communicate(timeout=60)
    assert command.returncode == 0, out + err
    assert "sacct" not in out + err
    assert "asks for 1 GPU, 2 CPUs, 1.1 GB, 30 min" in out
    assert fresh.output.read_bytes() == uninterrupted.output.read_bytes()
    assert fresh.lock == uninterrupted.lock


def test_each_action_asks_for_what_it_needs(fresh: Project, cluster: Slurm, wait_for: Wait) -> None:
    """Two trainings, of which one is stated to be larger, and a merge that is told to be a job; memory is estimated."""
    fresh.edit('memory = "1GiB"\n', "", "forge.local.toml")
    with (fresh.root / "forge.local.toml").open("a") as file:
        file.write(OTHERS)
    fresh.recipe.write_text(RECIPE + MORE)
    gate = fresh.root / "gate"
    gate.mkdir()
    command = fresh.start("build", "--plain", "toy", "toy:b", "toy:whole", "--on", "slurm", REHEARSAL_GATE=str(gate))
    try:
        wait_for(lambda: (gate / "toy-a").exists() and (gate / "toy-b").exists())
        listed = cluster.ask(
            "squeue", "--noheader", "--name=forge", "--states=RUNNING", "--format=%C %m %b %P"
        ).splitlines()
        assert sorted(" ".join(line.split()) for line in listed) == ["1 3G N/A low", "2 4G gres:gpu:1 urgent"]
    finally:
        shutil.rmtree(gate)
    out, err = command.communicate(timeout=120)
    assert command.returncode == 0, out + err
    assert "asks for 2 CPUs, 2.1 GB, 30 min" in out  # the merge
    assert "asks for 1 GPU, 2 CPUs, 4.3 GB, 20 min, partition urgent" in out


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
    assert 'it asks for 1 CPU, 966 GB, 30 min; other things can be asked for in [cluster.targets."toy:a"]' in said.out


def test_what_the_partition_does_not_allow_is_not_waited_for(fresh: Project, cluster: Slurm) -> None:
    fresh.edit("minutes = 30", "minutes = 6000", "forge.local.toml")
    said = fresh.forge("build", "--plain", "--on", "slurm", code=4)
    assert "its job would wait for ever (PartitionTimeLimit)" in said.out
    assert "it asks for 1 CPU, 1.1 GB, 100 h; less can be asked for" in said.out
    assert not cluster.job("PENDING,RUNNING")


def test_a_job_that_takes_more_memory_than_it_asked_for_is_not_begun_again(fresh: Project) -> None:
    fresh.edit("1GiB", "30MiB", "forge.local.toml")  # python alone has more
    said = fresh.forge("build", "--plain", "--on", "slurm", code=4, REHEARSAL_PAUSE="2")
    assert "its job ran out of memory (" in said.out
    assert "begun again" not in said.out
    assert "it asked for 1 CPU, 31.5 MB, 30 min; `memory` in" in said.out
