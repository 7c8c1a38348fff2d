"""Trainings on a real Ray cluster of two nodes: the same bytes, also where a node is lost or has too little memory.

`pytest -m slow tests/build/test_ray.py`, where Ray is installed with its client (`ray[client]`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdforge.cli import main
from sdforge.executors import ray
from tests.build.one_training import RECIPE, Wait, begin
from tests.conftest import METHODS, Project
from tests.ray_cluster import GIB, Ray, ray_cluster

pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray") / "gate"


@pytest.fixture(scope="module")
def cluster(gate: Path) -> Iterator[Ray]:
    # tasks have the environment of their nodes, not of those who ask for them
    with ray_cluster(FORGE_METHODS=str(METHODS), REHEARSAL_GATE=str(gate)) as found:
        yield found


@pytest.fixture
def fresh(fresh: Project, gate: Path) -> Iterator[Project]:
    """The project, which knows where its training waits."""
    fresh.environment = {"REHEARSAL_GATE": str(gate)}
    yield fresh
    shutil.rmtree(gate, ignore_errors=True)


def taken(cluster: Ray) -> tuple[float, ...]:
    """Return how many GPUs, CPUs and bytes of memory tasks have taken."""
    used = cluster.ask("used")
    return tuple(used[name] for name in ("GPU", "CPU", "memory"))


def test_a_task_asks_for_what_the_project_says(
    fresh: Project, uninterrupted: Project, cluster: Ray, gate: Path, wait_for: Wait
) -> None:
    fresh.edit("gpus = 0\ncpus = 1", "gpus = 1\ncpus = 2", "forge.local.toml")
    command = begin(fresh, wait_for, "--on", f"ray:{cluster.address}")
    wait_for(lambda: taken(cluster) == (1, 2, GIB))
    shutil.rmtree(gate)
    out, err = command.communicate(timeout=60)
    assert command.returncode == 0, out + err
    assert "asks for 1 GPU, 2 CPUs, 1.1 GB" in out
    assert fresh.output.read_bytes() == uninterrupted.output.read_bytes()
    assert fresh.lock == uninterrupted.lock


def test_actions_with_unlike_resources_go_where_they_fit(
    fresh: Project, cluster: Ray, gate: Path, wait_for: Wait
) -> None:
    fresh.recipe.write_text(
        RECIPE.replace("[preset]", '[rehearsal.b]\non = "base"\ndataset = "drawings"\nrank = 4\n\n[preset]')
    )
    with (fresh.root / "forge.local.toml").open("a") as file:
        file.write('[cluster.targets."toy:b"]\ngpus = 1\ncpus = 2\nmemory = "3GiB"\n')
    gate.mkdir()
    command = fresh.start("build", "toy", "toy:b", "--on", f"ray:{cluster.address}")
    wait_for(lambda: {path.name for path in gate.iterdir()} == {"toy-a", "toy-b"})
    wait_for(lambda: taken(cluster) == (1, 3, 4 * GIB))
    shutil.rmtree(gate)
    out, err = command.communicate(timeout=60)
    assert command.returncode == 0, out + err


def test_through_rays_client(fresh: Project, uninterrupted: Project, cluster: Ray) -> None:
    fresh.forge("build", "--plain", "--on", f"ray://{cluster.client}")
    assert fresh.output.read_bytes() == uninterrupted.output.read_bytes()


def test_a_task_whose_node_is_lost_goes_on_elsewhere_from_its_last_state(
    fresh: Project, uninterrupted: Project, cluster: Ray, gate: Path, wait_for: Wait
) -> None:
    fresh.edit("cpus = 1", "cpus = 2", "forge.local.toml")  # which the large node alone has
    command = begin(fresh, wait_for, "--on", f"ray:{cluster.address}")
    cluster.ask("lose")
    cluster.ask("gain")
    shutil.rmtree(gate)
    out, err = command.communicate(timeout=120)
    assert command.returncode == 0, out + err
    assert "begun again from the last kept state" in out
    assert "going on from step 4" in out
    assert fresh.output.read_bytes() == uninterrupted.output.read_bytes()


def test_what_no_node_has_is_said_and_not_waited_for_for_ever(
    fresh: Project, cluster: Ray, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "PATIENCE", 1.0)
    monkeypatch.setenv("FORGE_METHODS", str(METHODS))
    fresh.edit("gpus = 0", "gpus = 8", "forge.local.toml")
    assert main(["-C", str(fresh.root), "build", "--plain", "--on", f"ray:{cluster.address}"]) == 4
    said = capsys.readouterr().out
    lacking = "no node of the cluster has as much, but at most 2 CPUs, 1 GPUs, 4.3 GB of memory"
    assert f"    a: waits: {lacking}" in said
    assert f"its job would wait for ever ({lacking})" in said
    assert 'it asks for 8 GPUs, 1 CPU, 1.1 GB, 30 min; less can be asked for in [cluster.targets."toy:a"]' in said
    assert taken(cluster) == (0, 0, 0)


def test_a_task_that_is_ended_for_its_memory_is_not_begun_again(fresh: Project) -> None:
    environment = {"FORGE_METHODS": str(METHODS), "REHEARSAL_PAUSE": "1"}
    with ray_cluster(**environment, RAY_memory_usage_threshold="0.01", RAY_memory_monitor_refresh_ms="100") as cluster:
        said = fresh.forge("build", "--plain", "--on", f"ray:{cluster.address}", code=4)
    assert "its job ran out of memory (OutOfMemoryError)" in said.out
    assert "it asked for 1 CPU, 1.1 GB" in said.out
