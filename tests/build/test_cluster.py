"""Trainings as jobs of an engine: the same bytes, followed and stopped from here, begun again when a job is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.build.test_interrupts import RECIPE, Wait
from tests.conftest import Project, new_project

pytest.importorskip("submitit")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Path) -> Project:
    """The project as this machine builds it."""
    project = new_project(tmp_path_factory.mktemp("cluster") / "project", toy_checkpoint, RECIPE)
    (project.root / "forge.local.toml").write_text("[cluster]\ngpus = 0\ncpus = 1\n")
    project.build()
    return project


@pytest.fixture
def fresh(whole: Project, tmp_path: Path) -> Project:
    """The same with a cache of its own and no pins."""
    project = whole.clone(tmp_path / "project")
    (project.root / "forge.lock").unlink()
    return project


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


def begin(project: Project, wait_for: Wait) -> subprocess.Popen[str]:
    """Start a build whose job waits at step 5, with the state of step 4 published."""
    gate = project.root / "gate"
    gate.mkdir()
    command = project.start("build", "--plain", "--on", "processes", REHEARSAL_GATE=str(gate), REHEARSAL_AT="5")
    wait_for(lambda: (gate / "toy-a").exists())
    return command


def test_a_job_makes_what_this_machine_would(fresh: Project, whole: Project) -> None:
    ran = fresh.build("--on", "processes")
    assert ran.built == ["a", "preset.export"]
    assert [e["loss"] for e in ran.of("progress") if "loss" in e]
    assert fresh.output.read_bytes() == whole.output.read_bytes()
    assert fresh.lock == whole.lock


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGKILL], ids=["preempted", "killed"])
def test_a_job_that_is_lost_is_begun_again_from_its_last_state(
    fresh: Project, whole: Project, wait_for: Wait, number: int
) -> None:
    command = begin(fresh, wait_for)
    job = job_of(fresh)
    os.kill(job, number)
    wait_for(lambda: not Path(f"/proc/{job}").exists())
    shutil.rmtree(fresh.root / "gate")
    out, err = command.communicate(timeout=60)
    assert command.returncode == 0, out + err
    # a preempted job is put into the queue again by its engine, a dead one by us
    assert ("begun again from the last kept state" in out) == (number == signal.SIGKILL)
    assert "going on from step 4" in out
    assert fresh.output.read_bytes() == whole.output.read_bytes()


def test_an_interrupt_here_keeps_the_state_there(fresh: Project, whole: Project, wait_for: Wait) -> None:
    command = begin(fresh, wait_for)
    command.send_signal(signal.SIGINT)
    out, err = command.communicate(timeout=60)
    assert command.returncode == 130, out + err
    assert "the state of toy:a is kept" in err
    shutil.rmtree(fresh.root / "gate")
    assert "going on from step 5" in fresh.forge("build", "--plain").out
    assert fresh.output.read_bytes() == whole.output.read_bytes()


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


TWO_NODES = """
import subprocess, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
done = subprocess.run([*sys.argv[1:], "--on", f"ray:{cluster.address}"], capture_output=True, text=True)
print(done.stdout, done.stderr)
cluster.shutdown()
sys.exit(done.returncode)
"""


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes(fresh: Project, whole: Project) -> None:
    pytest.importorskip("ray")
    text = RECIPE.replace("[preset]", '[rehearsal.b]\non = "base"\ndataset = "drawings"\nrank = 4\n\n[preset]')
    fresh.recipe.write_text(text)
    environment = os.environ | {"FORGE_METHODS": str(Path(__file__).parents[1] / "methods"), "REHEARSAL_PAUSE": "0.3"}
    command = [sys.executable, "-c", TWO_NODES, sys.executable, "-m", "sdforge", "build", "--json", "toy", "toy:b"]
    done = subprocess.run(
        command, cwd=fresh.root, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {e["target"] for e in events if e.get("state") == "built"} >= {"toy:a", "toy:b", "toy:preset.export"}
    assert fresh.output.read_bytes() == whole.output.read_bytes()
