"""What an action asks for as a job of a cluster: what follows from it, and what `[cluster]` states instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod

import pytest

from sdforge.cli import main
from sdforge.executors import Resources
from sdforge.formats.safetensors import read_header
from sdforge.resources import NETWORK, PROCESS, is_job, resources, strange_targets
from tests.build.inline import Bench

RECIPE = """\
[weighted_sum.soft]
checkpoints = ["base", "ink"]
weights = [0.6, 0.4]

[extract.drift]
tuned = "ink"
base = "base"

[lora.style]
on = "base"
dataset = "drawings"
rank = 2

[preset]
checkpoint = "soft"
bake = { style = 0.8, drift = 0.5 }
previews.prompts = ["a square"]
"""
VARIANT = "\n[variant.long]\nstyle.steps = 900\n"
GIB = 2**30
Asked = Callable[..., dict[str, Resources]]


@pytest.fixture
def asked(bench: Bench) -> Asked:
    """Return target → what it asks for, under what forge.toml and forge.local.toml state of clusters; jobs alone."""
    bench.recipe(RECIPE)
    toml = (bench.root / "forge.toml").read_text()

    def ask(stated: str = "", local: str = "", device: str = "auto", threads: int = 1) -> dict[str, Resources]:
        (bench.root / "forge.toml").write_text(f"{toml}\n{stated}\n")
        (bench.root / "forge.local.toml").write_text(local)
        session = bench.session()
        plan = session.plan(session.resolve(["r"]))
        steps = [step for step in plan.to_do if is_job(session, step)]
        return {step.node.target.name: resources(session, step, device, threads) for step in steps}

    return ask


def test_what_computes_on_a_device_asks_for_a_gpu_and_what_is_over_in_seconds_is_no_job(asked: Asked) -> None:
    assert {name: (each.gpus, each.cpus) for name, each in asked().items()} == {
        "drift": (0, 1),
        "style": (1, 4),
        "preset.previews": (1, 4),
    }


def test_on_the_cpu_no_gpu_is_asked_for_and_as_many_cpus_as_threads(asked: Asked) -> None:
    found = asked(device="cpu", threads=6)
    assert {(each.gpus, each.cpus) for each in found.values()} == {(0, 6)}


def test_memory_follows_from_networks_and_from_what_is_learned(
    bench: Bench, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {each.memory for each in asked().values()} == {PROCESS + GIB}  # a toy's networks are less than one GiB
    monkeypatch.setattr("sdforge.resources.GIB", 1)  # to which it is rounded up
    small = asked()["style"].memory
    bench.recipe(RECIPE.replace("rank = 2", "rank = 4"))
    learned = asked()["style"].memory - small
    files = (read_header(path) for path in (bench.root / "base").glob("*/*.safetensors"))
    numbers = sum(prod(entry.shape) for file in files for entry in file.tensors.values())
    assert small == pytest.approx(PROCESS + NETWORK * numbers + learned, abs=2)


def test_what_is_stated_of_a_target_goes_before_its_method_its_kind_and_all(asked: Asked) -> None:
    found = asked(
        """
[cluster]
memory = "1GB"
minutes = 60
partition = "all"
cpus = 2

[cluster.trainings]
memory = "2GB"
partition = "gpu"
cpus = 8

[cluster.methods.lora]
memory = "3GB"
partition = "a100"

[cluster.targets."r:style"]
memory = "4GB"
"""
    )
    assert found["style"] == Resources(1, 8, 4 * 10**9, 60, "a100")
    assert found["preset.previews"] == Resources(1, 2, 10**9, 60, "all")


def test_gpus_of_all_are_for_what_computes_on_a_device(asked: Asked) -> None:
    found = asked("[cluster]\ngpus = 2\n")
    assert [found[name].gpus for name in ("style", "preset.previews", "drift")] == [2, 2, 0]
    assert asked("[cluster]\ngpus = 2\n[cluster.edits]\ngpus = 1\n")["drift"].gpus == 1


def test_an_empty_memory_is_what_the_engine_gives(asked: Asked) -> None:
    assert asked('[cluster]\nmemory = ""\n')["style"].memory == 0


def test_forge_local_toml_states_single_things_otherwise(asked: Asked) -> None:
    shared = '[cluster.trainings]\nmemory = "2GB"\ncpus = 8\n[cluster.targets."r:style"]\nminutes = 7\n'
    local = '[cluster.trainings]\ncpus = 3\n[cluster.targets."r:style"]\npartition = "mine"\n'
    assert asked(shared, local)["style"] == Resources(1, 3, 2 * 10**9, 7, "mine")


def test_what_runs_here_and_what_is_a_job_can_be_stated(asked: Asked) -> None:
    found = asked("[cluster.formulas]\nhere = false\n[cluster.edits]\nhere = true\n")
    assert {name: each.gpus for name, each in found.items()} == {
        "soft": 0,
        "style": 1,
        "preset.bake": 0,
        "preset.previews": 1,
    }
    assert found["soft"].cpus == 3


def test_a_target_of_a_variant_has_what_is_stated_of_the_plain_one_and_its_own(bench: Bench) -> None:
    bench.recipe(RECIPE + VARIANT)
    stated = '[cluster.targets."r:style"]\nminutes = 7\ncpus = 2\n[cluster.targets."r@long:style"]\nminutes = 9\n'
    (bench.root / "forge.local.toml").write_text(stated)
    session = bench.session()
    plan = session.plan(session.resolve(["r", "r@long"]))
    asked = {name: resources(session, plan.steps[name], "cpu", 1) for name in ("r:style", "r@long:style")}
    assert [(each.minutes, each.cpus) for each in asked.values()] == [(7, 2), (9, 2)]
    assert not strange_targets(session.project)


def test_no_key_depends_on_what_is_asked_for(bench: Bench) -> None:
    bench.recipe(RECIPE)
    before = {name: (step.key, step.manifest) for name, step in bench.plan().steps.items()}
    with (bench.root / "forge.toml").open("a") as file:
        file.write('[cluster]\ngpus = 4\nmemory = "64GB"\n[cluster.targets."r:style"]\ncpus = 9\n')
    assert {name: (step.key, step.manifest) for name, step in bench.plan().steps.items()} == before


def test_a_plan_shows_what_jobs_would_ask_for(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.recipe(RECIPE)
    arguments = ["-C", str(bench.root), "plan", "r", "--on", "slurm"]
    capsys.readouterr()
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    (style,) = (number for number, line in enumerate(lines) if " style " in line)
    assert lines[style + 1] == "      a job: 1 GPU, 4 CPUs, 3.2 GB, 24 h"
    assert main([*arguments, "--json"]) == 0
    actions = json.loads(capsys.readouterr().out)["actions"]
    jobs = {action["target"]: action["resources"]["gpus"] for action in actions if "resources" in action}
    assert jobs == {"r:drift": 0, "r:style": 1, "r:preset.previews": 1}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("[cluster.training]\ncpus = 1\n", ("did you mean `trainings`?",)),
        ("[cluster.trainings]\nmem = '4GB'\n", ("here it is `memory`",)),
        ("[cluster.trainings]\nmemory = '4 gigs'\n", ('as in "8GB" or "500MiB"',)),
        (
            "[cluster.methods.lara]\ncpus = 1\n",
            (
                "there is no method `lara`",
                "did you mean `lora`?",
            ),
        ),
        (
            "[cluster.targets.style]\ncpus = 1\n",
            (
                "`style` names no target",
                '[cluster.targets."RECIPE:TARGET"]',
            ),
        ),
        (
            "[cluster.targets.'r:stile']\ncpus = 1\n",
            (
                "`r:stile` is no target of",
                'did you mean "r:style"?',
            ),
        ),
        (
            "[cluster.targets.'p:style']\ncpus = 1\n",
            (
                "`p:style` is no target of",
                'did you mean "r:style"?',
            ),
        ),
    ],
    ids=["a kind", "a setting", "an amount", "a method", "no recipe named", "a target", "a recipe"],
)
def test_a_mistake_in_what_is_asked_for_is_said_at_its_place(
    bench: Bench, capsys: pytest.CaptureFixture[str], table: str, words: tuple[str, ...]
) -> None:
    bench.recipe(RECIPE)
    (bench.root / "forge.local.toml").write_text(f"\n{table}")
    assert main(["-C", str(bench.root), "check"]) == 2
    said = capsys.readouterr().err
    assert "forge.local.toml:" in said
    assert all(each in said for each in words), said


def test_a_target_that_there_is_not_is_said_before_anything_runs(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.recipe(RECIPE)
    (bench.root / "forge.local.toml").write_text('[cluster.targets."r:stile"]\ncpus = 1\n')
    for command in ("plan", "build"):
        assert main(["-C", str(bench.root), command, "r", "--on", "slurm"]) == 2
        assert "forge.local.toml:1:2: error[name]: `r:stile` is no target" in capsys.readouterr().err


def test_a_plan_for_what_is_no_cluster_is_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.recipe(RECIPE)
    assert main(["-C", str(bench.root), "plan", "r", "--on", "k8s"]) == 2
    assert "'k8s' is no cluster" in capsys.readouterr().err
