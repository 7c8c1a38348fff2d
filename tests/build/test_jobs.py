"""A job of an engine, as forge follows it: how it stands, when it is over, and who may speak for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdforge.executors import cluster, slurm
from sdforge.executors.cluster import RETRIES, SpoolHandle
from sdforge.executors.jobs import Ended
from sdforge.executors.slurm import Queue, SlurmJob
from sdforge.run.spool import EVENTS, STOP, Spool


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


@pytest.mark.parametrize(("state", "code"), [("CANCELLED", 1), ("OUT_OF_MEMORY", 4), ("TIMEOUT", 0), ("FAILED", 0)])
def test_what_would_end_alike_again_is_not_begun_again(squeue: Path, state: str, code: int) -> None:
    job = SlurmJob(Submitted(), Queue())
    squeue.write_text(f"7|{state}|None|n1\n")
    job.ended()
    end = job.ended()
    assert end is not None
    assert end.code == code
    assert bool(end.hint) == bool(code)


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

    def launch(self, folder: Path) -> Ending:  # noqa: ARG002 -- no job reads it
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
    handle = SpoolHandle(launcher, folder)
    handle.thread.join(10)
    return handle.poll()


def test_a_job_without_a_last_word_is_begun_again_some_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Ending(Ended("NODE_FAIL"))
    *before, end = follow(launcher, tmp_path, monkeypatch)
    assert launcher.launched == RETRIES + 1
    assert [event["remark"] for event in before] == [
        "its job is gone (NODE_FAIL); begun again from the last kept state"
    ] * RETRIES
    assert end["message"] == f"its job ended {RETRIES + 1} times without a word (NODE_FAIL)"
    assert end["hint"] == "the engine's log may say why: /logs/1.err"


def test_a_job_that_was_cancelled_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Ending(Ended("CANCELLED", 1, "scancel"))
    (end,) = follow(launcher, tmp_path, monkeypatch)
    assert launcher.launched == 1
    assert end == {"event": "failed", "code": 1, "message": "its job ended: CANCELLED", "hint": "scancel"}


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
