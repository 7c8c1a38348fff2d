"""Bytes of processes: all are taken once and in order, errors come back as they are, a lost process is no silence."""

from __future__ import annotations

import hashlib
import os
import signal
import struct
import time
from collections.abc import Callable, Collection, Generator
from contextlib import closing
from functools import partial
from itertools import accumulate
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdforge.errors import ActionFailed, ResourceError
from sdforge.order import Computation, Order
from sdforge.ref import Damaged, Ref
from sdforge.run.formula import run_formula
from sdforge.run.side_by_side import CAN_FORK, NUMBER, _next, in_order
from sdforge.store import poured
from sdforge.store.poured import BUFFER, Poured
from tests.families.workbench import keep, reference

forked = pytest.mark.skipif(not CAN_FORK, reason="nothing is forked here")


AHEAD = 4
Bytes = Generator[bytes | bytearray, None, Any]
Jobs = dict[str, Callable[[], Bytes]]


def writing(
    folder: Path, jobs: Jobs, sizes: list[int], processes: int, here: Collection[str] = ()
) -> Generator[tuple[str, Any]]:
    """Do jobs that make so many bytes each, and yield what `in_order` yields; the file is whole then."""
    ends = list(accumulate(sizes))
    spans = {name: (end - size, size) for name, end, size in zip(jobs, ends, sizes, strict=True)}
    with Poured(folder / "file", b"", ends[-1], body=False, ahead=AHEAD) as file:
        with closing(in_order(jobs, file, spans, processes, here)) as done:
            yield from done
        file.close()


def by(name: str, size: int = 3) -> Bytes:
    """Say a name in several pieces, and who said it."""
    time.sleep(0.001)
    for i in range(size):
        yield f"{name}{i},".encode()
    return name.upper(), os.getpid()


def says(name: str, size: int = 3) -> int:
    """Return how many bytes that is."""
    return sum(len(piece) for piece in by(name, size))


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_every_job_is_done_once_and_what_it_makes_is_taken_in_its_turn(processes: int, tmp_path: Path) -> None:
    jobs: Jobs = {str(i): partial(by, f"n{i}", i % 4) for i in range(50)}
    sizes = [says(f"n{i}", i % 4) for i in range(50)]
    found = list(writing(tmp_path, jobs, sizes, processes))
    assert [(name, said) for name, (said, _) in found] == [(str(i), f"N{i}") for i in range(50)]
    assert (tmp_path / "file").read_text() == "".join(f"n{i}{j}," for i in range(50) for j in range(i % 4))
    assert (os.getpid() in {pid for _, (_, pid) in found}) == (not (processes and CAN_FORK))


@forked
def test_no_two_processes_get_one_job(tmp_path: Path) -> None:
    """Both ask for one job after the other, and do nothing in between."""
    numbers, count = os.memfd_create("jobs"), 30_000
    os.pwrite(numbers, b"".join(i.to_bytes(NUMBER, "little") for i in range(count)), 0)
    children = []
    for name in "ab":
        if not (child := os.fork()):
            found = []
            while number := _next(numbers):
                found.append(number)
            (tmp_path / name).write_bytes(b"".join(found))
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    os.close(numbers)
    taken = (tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes()
    assert sorted(struct.iter_unpack("<I", taken)) == [(i,) for i in range(count)]


@forked
def test_what_this_process_does_itself_stands_in_its_turn_too(tmp_path: Path) -> None:
    jobs: Jobs = {str(i): partial(by, f"n{i}") for i in range(9)}
    found = dict(writing(tmp_path, jobs, [says("n0")] * 9, 2, {"3", "4"}))
    assert (tmp_path / "file").read_text() == "".join(f"n{i}{j}," for i in range(9) for j in range(3))
    assert {name for name, (_, pid) in found.items() if pid == os.getpid()} == {"3", "4"}


@forked
@pytest.mark.parametrize("here", [(), ("2",)])
def test_what_is_larger_than_the_window_passes_through_it(here: tuple[str, ...], tmp_path: Path) -> None:
    """Others write as far ahead as the window reaches, and wait, while the first job's bytes are taken."""
    whole = (poured.BUFFERS + AHEAD) * BUFFER
    sizes = [5, 2 * whole + 5, whole, 0, 7, BUFFER, BUFFER // 2]

    def job(i: int) -> Bytes:
        left = sizes[i]
        while left:
            step = min(left, BUFFER // 3)
            yield bytearray(bytes([i + 1]) * step)
            left -= step
        return i

    jobs: Jobs = {str(i): partial(job, i) for i in range(len(sizes))}
    assert list(writing(tmp_path, jobs, sizes, 2, here)) == [(str(i), i) for i in range(len(sizes))]
    found = np.fromfile(tmp_path / "file", np.uint8)
    assert np.array_equal(found, np.repeat(np.arange(1, len(sizes) + 1, dtype=np.uint8), sizes))


@forked
def test_who_makes_more_than_was_said_does_not_write_over_what_follows(tmp_path: Path) -> None:
    jobs: Jobs = {"a": partial(by, "a"), "b": partial(by, "b")}
    with pytest.raises(ValueError, match="a makes more bytes than it has"):
        list(writing(tmp_path, jobs, [says("a") - 1, says("b") + 1], 1))


def large(size: int) -> Bytes:
    for start in range(0, size, BUFFER):
        yield bytearray(min(BUFFER, size - start))


def fail(error: Exception) -> Bytes:
    yield b"something"
    raise error


REF = Ref("w", "F16", (1,), "/somewhere", 0, "")


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize(
    "error", [Damaged(REF), ActionFailed("w holds NaN", "a hint"), OSError(28, "full", "pack"), MemoryError("1 GB")]
)
def test_an_error_comes_back_as_it_was(error: Exception, processes: int, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught:
        list(writing(tmp_path, {"a": partial(fail, error)}, [20], processes))
    assert str(caught.value) == str(error)
    assert caught.value.__dict__ == error.__dict__


@forked
def test_a_process_that_was_killed_is_named_while_the_other_one_waits(tmp_path: Path) -> None:
    def killed() -> Bytes:
        yield b"."
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    with pytest.raises(ResourceError, match=r"ended \(-9\)") as caught:
        list(writing(tmp_path, {"a": killed, "b": partial(large, 20 * BUFFER)}, [1, 20 * BUFFER], 2))
    assert "memory" in caught.value.hint


@forked
def test_who_leaves_early_leaves_no_process_behind(tmp_path: Path) -> None:
    done = writing(tmp_path, {str(i): partial(by, "x") for i in range(1000)}, [says("x")] * 1000, 2)
    _, (_, pid) = next(done)
    done.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@forked
@pytest.mark.parametrize("size", [0, BUFFER])
def test_a_process_whose_parent_is_gone_ends(size: int, tmp_path: Path) -> None:
    """The parent is killed where it waits: its process says what it did, or waits for room, and does no more jobs."""
    (tmp_path / "done").mkdir()

    def job(name: str) -> Bytes:
        time.sleep(0.02)
        (tmp_path / "done" / name).write_text("")
        yield from large(size)

    parent = os.fork()
    if not parent:
        jobs: Jobs = {f"{i:03}": partial(job, f"{i:03}") for i in range(200)}
        for _ in writing(tmp_path, jobs, [size] * 200, 1):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    before = -1
    while before != (now := len(list((tmp_path / "done").iterdir()))):
        before = now
        time.sleep(0.2)
    assert now < 100


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


@forked
def test_a_formula_that_is_stopped_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error holds on to all that it came through, and still nothing of it works on."""
    monkeypatch.setattr("sdforge.run.formula.SMALL", 0)
    base = keep(tmp_path / "in", {"unet": {n: torch.ones(9).half() for n in "ab"}})
    both = tuple(reference(t, base.files) for t in base.tables["unet"])
    rows = [Computation("unet", f"t{i}", "F16", (9,), "add", {"weight": 0.5}, both) for i in range(9)]

    def stop(**_: object) -> None:
        raise KeyboardInterrupt

    order = Order("", "", "", "merges", "sd15", {}, str(tmp_path), compute=rows)
    with pytest.raises(KeyboardInterrupt) as caught:
        run_formula(order, stop)
    assert caught.tb is not None
    assert not active_children()
