"""Jobs of processes of their own: all are done once, errors come back as they are, and a lost process is no silence."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from sdforge.errors import ActionFailed, ResourceError
from sdforge.order import Computation, Order
from sdforge.ref import Damaged, Ref
from sdforge.run.formula import run_formula
from sdforge.run.side_by_side import CAN_FORK, each_done
from tests.families.workbench import keep, reference

forked = pytest.mark.skipif(not CAN_FORK, reason="nothing is forked here")


def by(name: str) -> tuple[str, int]:
    time.sleep(0.001)
    return name.upper(), os.getpid()


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_every_job_is_done_once(processes: int) -> None:
    jobs = {str(i): partial(by, f"n{i}") for i in range(50)}
    found = list(each_done(jobs, processes))
    assert sorted(name for name, _ in found) == sorted(jobs)
    assert {name: said for name, (said, _) in found} == {str(i): f"N{i}" for i in range(50)}
    assert (os.getpid() in {pid for _, (_, pid) in found}) == (not (processes and CAN_FORK))


def fail(error: Exception) -> None:
    raise error


REF = Ref("w", "F16", (1,), "/somewhere", 0, "")


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("error", [Damaged(REF), ActionFailed("w holds NaN", "a hint"), OSError(28, "full", "pack")])
def test_an_error_comes_back_as_it_was(error: Exception, processes: int) -> None:
    with pytest.raises(type(error)) as caught:
        list(each_done({"a": partial(fail, error)}, processes))
    assert str(caught.value) == str(error)
    assert caught.value.__dict__ == error.__dict__


@forked
def test_a_process_that_was_killed_is_named() -> None:
    jobs: dict[str, Callable[[], None]] = {"a": lambda: os.kill(os.getpid(), signal.SIGKILL)}
    with pytest.raises(ResourceError, match=r"ended \(-9\)") as caught:
        list(each_done(jobs, 2))
    assert "memory" in caught.value.hint


@forked
def test_who_leaves_early_leaves_no_process_behind() -> None:
    done = each_done({str(i): partial(by, "x") for i in range(1000)}, 2)
    _, (_, pid) = next(done)
    done.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@forked
def test_a_process_whose_parent_is_gone_ends(tmp_path: Path) -> None:
    """The parent is killed where it waits: its process says what it did, to nobody, and does no second job."""

    def job(name: str) -> None:
        time.sleep(0.05)
        (tmp_path / name).write_text("")

    parent = os.fork()
    if not parent:
        for _ in each_done({f"{i:03}": partial(job, f"{i:03}") for i in range(200)}, 1):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    time.sleep(0.3)
    assert len(list(tmp_path.iterdir())) <= 3


@forked
def test_processes_write_the_pack_that_one_alone_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(1)
    base = keep(tmp_path / "in", {"unet": {n: torch.randn(300, 7, generator=draw).half() for n in "ab"}})
    both = tuple(reference(t, base.files) for t in sorted(base.tables["unet"]))
    rows = [
        Computation("unet", f"t{i}", "F16", (300, 7), "weighted_sum", {"weights": [i / 9, 1 - i / 9]}, both)
        for i in range(1, 9)
    ]
    outcomes = []
    for folder, small in (("alone", 1 << 40), ("several", 0)):
        monkeypatch.setattr("sdforge.run.formula.SMALL", small)
        (tmp_path / folder).mkdir()
        order = Order("", "", "", "merges", "sd15", {}, str(tmp_path / folder), compute=rows)
        outcomes.append(run_formula(order, lambda **_: None))
        data = (tmp_path / folder / outcomes[-1].pack).read_bytes()
        assert outcomes[-1].sha256 == hashlib.sha256(data).hexdigest()
    assert outcomes[0] == outcomes[1]
