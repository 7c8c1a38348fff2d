"""A job of an engine, as forge follows it: how it stands, when it is over, and who may speak for it."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sdforge.executors import Resources, cluster, ray, slurm
from sdforge.executors.cluster import LINES, RETRIES, WIDTH, SpoolHandle
from sdforge.executors.jobs import CANCELLED, LIMITS, LOST, MEMORY, Ended
from sdforge.executors.ray import RayJob
from sdforge.executors.slurm import Queue, SlurmJob, SubmititLauncher
from sdforge.run.spool import EVENTS, LOG, STOP, Spool

ASKED = Resources(1, 4, 8 * 10**9, 120, "")


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `squeue` that prints this file (and fails where it holds an error), and is asked whenever one looks."""
    said = tmp_path / "said"
    said.write_text("")
    program = tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ngrep -q error {said} && cat {said} >&2 && exit 1\ncat {said}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setattr(slurm, "ASKED", -1.0)
    return said


class Submitted:
    """What submitit returns of a job."""

    class paths:  # noqa: N801 -- as submitit has it
        stderr = "/logs/7.err"

    job_id = "7"


def test_a_job_that_is_put_into_the_queue_again_is_not_over(squeue: Path) -> None:
    job = SlurmJob(Submitted(), Queue())
    squeue.write_text("7|PENDING|Resources|\n")
    assert job.ended() is None
    assert job.stands() == "job 7 waits in Slurm's queue (Resources)"
    squeue.write_text("7|RUNNING|None|n1\n")
    assert job.stands() == "job 7 runs on n1"
    squeue.write_text("7|PREEMPTED|None|n1\n")
    assert job.ended() is None
    squeue.write_text("7|PENDING|BeginTime|\n")
    assert job.ended() is None
    squeue.write_text("7|NODE_FAIL|None|n1\n")
    assert (job.ended(), job.ended()) == (None, Ended("NODE_FAIL"))


@pytest.mark.parametrize(
    ("state", "why"), [("CANCELLED", CANCELLED), ("OUT_OF_MEMORY", MEMORY), ("TIMEOUT", LOST), ("FAILED", LOST)]
)
def test_what_would_end_alike_again_is_told_from_what_was_lost(squeue: Path, state: str, why: str) -> None:
    job = SlurmJob(Submitted(), Queue())
    squeue.write_text(f"7|{state}|None|n1\n")
    assert (job.ended(), job.ended()) == (None, Ended(state, why))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("slurmstepd-n1: error: StepId=7.0 exceeded memory limit (38305792 > 31457280), being killed", MEMORY),
        (
            "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed.",
            MEMORY,
        ),
        ("srun: error: n1: task 0: Out Of Memory", MEMORY),
        ("srun: error: n1: task 0: Killed", LOST),
        ("RuntimeError: CUDA out of memory", LOST),
    ],
)
def test_what_slurm_says_of_memory_in_a_jobs_log_is_heard(squeue: Path, tmp_path: Path, said: str, why: str) -> None:
    job = SlurmJob(Submitted(), Queue())
    job.log = str(tmp_path / "7.err")
    Path(job.log).write_text(f"it begins\n{said}\n")
    squeue.write_text("7|FAILED|NonZeroExitCode|n1\n")
    job.ended()
    end = job.ended()
    assert end is not None
    assert end.why == why


@pytest.mark.parametrize(
    ("reason", "for_ever"),
    [
        ("PartitionTimeLimit", True),
        ("BadConstraints", True),
        ("AssocMaxGRESPerJob", True),
        ("QOSMaxMemoryPerJob", True),
        ("MaxMemPerLimit", False),
        ("Resources", False),
        ("Priority", False),
        ("QOSMaxGRESPerUser", False),
        ("ReqNodeNotAvail", False),
        ("PartitionNodeLimit", False),
    ],
)
def test_a_job_that_asks_for_too_much_does_not_wait_for_ever(squeue: Path, reason: str, for_ever: bool) -> None:
    job = SlurmJob(Submitted(), Queue())
    squeue.write_text(f"7|PENDING|{reason}|\n")
    assert job.ended() is None
    assert job.ended() == (Ended(reason, LIMITS) if for_ever else None)


def test_jobs_with_unlike_resources_ask_slurm_for_what_each_of_them_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncat "$1" >> {tmp_path}/scripts\necho Submitted batch job 7\n')
    program.chmod(0o755)
    (program.parent / "srun").symlink_to(program)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    launcher = SubmititLauncher("slurm", "gpu", tmp_path / "logs")
    launcher.launch(tmp_path, Resources(1, 4, 32 * 10**9, 600, "a100"))
    launcher.launch(tmp_path, Resources(0, 2, 0, 30, ""))
    lines = (tmp_path / "scripts").read_text().splitlines()
    asked = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    end = asked.index("cpus-per-task=2")  # flags are sorted, and this is the second script's first
    first, second = asked[:end], asked[end:]
    assert {"gpus-per-node=1", "cpus-per-task=4", "mem=30518MB", "time=600", "partition=a100"} <= {*first}
    assert {"cpus-per-task=2", "time=30", "partition=gpu"} <= {*second}
    assert not [line for line in second if line.startswith(("mem", "gpus"))]
    steps = [line.split()[2:] for line in lines if line.startswith("srun")]
    assert [("--cpus-per-task=4" in step, "--cpus-per-task=2" in step) for step in steps] == [
        (True, False),
        (False, True),
    ]


def test_a_job_that_slurm_has_forgotten_is_over_and_a_slurm_that_is_silent_tells_nothing(squeue: Path) -> None:
    job = SlurmJob(Submitted(), Queue())
    squeue.write_text("slurm_load_jobs error: Unable to contact slurm controller\n")
    assert [job.ended() for _ in range(3)] == [None] * 3
    squeue.write_text("slurm_load_jobs error: Invalid job id specified\n")
    assert (job.ended(), job.ended()) == (None, Ended("GONE"))


def test_slurm_is_asked_of_all_jobs_at_once_and_not_often(
    squeue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "ASKED", 60.0)
    queue = Queue()
    for name in ("7", "8"):
        queue.add(name)
    squeue.write_text("7|RUNNING|None|n1\n8|PENDING|Priority|\n")
    queue.asked = -100.0  # long ago
    assert [queue.look(name)[1].state for name in ("7", "8", "7")] == ["RUNNING", "PENDING", "RUNNING"]
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert "--jobs=7,8" in asked or "--jobs=8,7" in asked


class Ending:
    """A launcher whose jobs end at once, without a word."""

    log = "/logs/1.err"

    def __init__(self, how: Ended) -> None:
        self.how, self.launched, self.cancelled = how, 0, False

    def launch(self, folder: Path, resources: Resources) -> Ending:  # noqa: ARG002 -- no job reads them
        self.launched += 1
        return self

    def ended(self) -> Ended:
        return self.how

    def stands(self) -> str:
        return ""

    def cancel(self) -> None:
        self.cancelled = True


def follow(launcher: Ending, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return all that is said of an action until its end."""
    monkeypatch.setattr(cluster, "TICK", 0.0)
    monkeypatch.setattr(cluster, "LAG", 0.0)
    handle = SpoolHandle(launcher, folder, "toy:a", ASKED)
    handle.thread.join(10)
    first, *others = handle.poll()
    assert (first["remark"], first["resources"]["memory"]) == ("asks for 1 GPU, 4 CPUs, 8.0 GB, 2 h", 8 * 10**9)
    return others


def test_what_a_job_prints_comes_line_by_line_and_before_its_end(tmp_path: Path) -> None:
    handle = SpoolHandle.__new__(SpoolHandle)
    handle.folder, handle.read = tmp_path, Counter()
    assert handle._printed() == []
    log = tmp_path / LOG
    log.write_bytes(b"one\n\n 10%\r 20%\r 30%\r\ntw")
    assert handle._printed() == ["one", " 30%"]
    with log.open("ab") as file:
        file.write(b"o \xff" + b"x" * 2 * WIDTH + b"\n")
    (line,) = handle._printed()
    assert line.startswith("two �x")
    assert len(line) == WIDTH
    with log.open("ab") as file:
        file.write(b"again\n" * (LINES + 7))
    assert handle._printed() == ["again"] * LINES + ["… and 7 lines more"]


def test_a_job_without_a_last_word_is_begun_again_some_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Ending(Ended("NODE_FAIL"))
    *before, end = follow(launcher, tmp_path, monkeypatch)
    assert launcher.launched == RETRIES + 1
    assert [event["remark"] for event in before] == [
        "its job is gone (NODE_FAIL); begun again from the last kept state"
    ] * RETRIES
    assert end["message"] == f"its job ended {RETRIES + 1} times without a word (NODE_FAIL)"
    assert end["hint"] == "the engine's log may say why: /logs/1.err"


@pytest.mark.parametrize(
    ("end", "code", "message", "hint"),
    [
        (
            Ended("CANCELLED", CANCELLED),
            1,
            "its job ended: CANCELLED",
            "somebody wanted that; a build goes on from the last kept state",
        ),
        (
            Ended("OUT_OF_MEMORY", MEMORY),
            4,
            "its job ran out of memory (OUT_OF_MEMORY)",
            (
                'it asked for 1 GPU, 4 CPUs, 8.0 GB, 2 h; `memory` in [cluster.targets."toy:a"] of forge.local.toml '
                "asks for more"
            ),
        ),
        (
            Ended("PartitionTimeLimit", LIMITS),
            4,
            "its job would wait for ever (PartitionTimeLimit)",
            (
                'it asks for 1 GPU, 4 CPUs, 8.0 GB, 2 h; less can be asked for in [cluster.targets."toy:a"] of '
                "forge.local.toml"
            ),
        ),
    ],
    ids=["cancelled", "memory", "limits"],
)
def test_a_job_that_would_end_alike_again_fails_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Ended, code: int, message: str, hint: str
) -> None:
    launcher = Ending(end)
    assert follow(launcher, tmp_path, monkeypatch) == [
        {"event": "failed", "code": code, "message": message, "hint": hint}
    ]
    assert launcher.launched == 1
    assert launcher.cancelled  # one that waits is waited for no more


class Slow(Ending):
    """A launcher that takes its time, and whose jobs never end."""

    def __init__(self) -> None:
        super().__init__(Ended(""))
        self.begun, self.go_on = threading.Event(), threading.Event()

    def launch(self, folder: Path, resources: Resources) -> Slow:
        self.begun.set()
        self.go_on.wait(10)
        super().launch(folder, resources)
        return self

    def ended(self) -> None:  # type: ignore[override] -- it goes on
        return None


def test_a_job_that_is_killed_while_it_is_launched_does_not_run_on(tmp_path: Path) -> None:
    launcher = Slow()
    handle = SpoolHandle(launcher, tmp_path, "toy:a", ASKED)
    launcher.begun.wait(10)
    handle.kill()
    launcher.go_on.set()
    handle.thread.join(10)
    assert handle.poll()[-1] == {"event": "stopped"}
    assert launcher.cancelled


def test_a_job_that_writes_nonsense_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "TICK", 0.0)
    (tmp_path / EVENTS).write_text("{\n")
    launcher = Slow()
    launcher.go_on.set()
    handle = SpoolHandle(launcher, tmp_path, "toy:a", ASKED)
    handle.thread.join(10)
    assert handle.poll()[-1]["code"] == 4
    assert launcher.cancelled


class Nodes:
    """Ray, as far as a task is followed: its nodes, and whether the task has ended."""

    class exceptions:  # noqa: N801 -- as Ray has it
        class RayError(Exception):
            """What all of its errors are."""

        class OutOfMemoryError(RayError):
            """A task took too much."""

    def __init__(self, *nodes: dict[str, float]) -> None:
        self.have, self.end = nodes, None

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": node} for node in self.have] + [{"Alive": False, "Resources": {"GPU": 9}}]

    def wait(self, references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:  # noqa: ARG002
        return (references, []) if self.end else ([], references)

    def get(self, reference: Any) -> None:  # noqa: ARG002
        assert self.end is not None
        raise self.end


def test_a_task_that_no_node_can_hold_is_told_of_and_given_up_after_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Nodes({"CPU": 8, "memory": 4e9}, {"CPU": 2, "GPU": 1, "memory": 64e9})
    job = RayJob(nodes, None, {"CPU": 4, "GPU": 1})  # each is there, but not on one node
    lacking = "no node of the cluster has as much, but at most 8 CPUs, 1 GPUs"
    assert (job.stands(), job.ended()) == (f"waits: {lacking}", None)
    monkeypatch.setattr(ray, "PATIENCE", -1.0)
    assert job.ended() == Ended(lacking, LIMITS)
    monkeypatch.setattr(ray, "ASKED", -1.0)
    nodes.have = ({"CPU": 4, "GPU": 1},)  # the cluster has grown
    assert (job.ended(), job.stands()) == (None, "")


def test_a_task_that_ended_for_its_memory_is_told_from_one_whose_node_is_lost() -> None:
    nodes = Nodes({"CPU": 1})
    job = RayJob(nodes, None, {"CPU": 1})
    nodes.end = nodes.exceptions.OutOfMemoryError()
    assert job.ended() == Ended("OutOfMemoryError", MEMORY)
    nodes.end = nodes.exceptions.RayError()
    assert job.ended() == Ended("RayError", LOST)


def test_of_two_runners_of_an_order_the_first_falls_silent(tmp_path: Path) -> None:
    (tmp_path / "builder").touch()
    first = Spool(tmp_path)
    first.say({"event": "progress", "step": 1})
    assert not first.stopped()
    second = Spool(tmp_path)
    first.say({"event": "progress", "step": 2})
    second.say({"event": "progress", "step": 1})
    assert first.stopped()
    assert not second.stopped()
    assert [json.loads(line)["step"] for line in (tmp_path / EVENTS).read_text().splitlines()] == [1, 1]
    (tmp_path / STOP).touch()
    assert second.stopped()
