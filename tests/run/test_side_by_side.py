"""Bytes of processes: all are taken once and in order, errors come back as they are, a lost process is no silence."""

from __future__ import annotations

import hashlib
import os
import signal
import struct
import time
from collections import Counter
from collections.abc import Generator
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch

from sdforge.errors import ActionFailed, ResourceError
from sdforge.order import Computation, Order
from sdforge.ref import Damaged, Ref
from sdforge.run.formula import run_formula
from sdforge.run.side_by_side import CAN_FORK, NUMBER, SLOT, SLOTS, _next, in_order
from tests.families.workbench import keep, reference

forked = pytest.mark.skipif(not CAN_FORK, reason="nothing is forked here")


Bytes = Generator[bytes, None, tuple[str, int]]


def by(name: str, size: int = 3) -> Bytes:
    """Say a name in several pieces, and who said it."""
    time.sleep(0.001)
    for i in range(size):
        yield f"{name}{i},".encode()
    return name.upper(), os.getpid()


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_every_job_is_done_once_and_what_it_makes_is_taken_in_its_turn(processes: int) -> None:
    jobs = {str(i): partial(by, f"n{i}", i % 4) for i in range(50)}
    taken: list[bytes] = []
    found = list(in_order(jobs, lambda piece: taken.append(bytes(piece)), processes))
    assert [(name, said) for name, (said, _) in found] == [(str(i), f"N{i}") for i in range(50)]
    assert b"".join(taken).decode() == "".join(f"n{i}{j}," for i in range(50) for j in range(i % 4))
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
def test_what_this_process_does_itself_stands_in_its_turn_too() -> None:
    jobs = {str(i): partial(by, f"n{i}") for i in range(9)}
    taken: list[bytes] = []
    found = dict(in_order(jobs, lambda piece: taken.append(bytes(piece)), 2, {"3", "4"}))
    assert b"".join(taken).decode() == "".join(f"n{i}{j}," for i in range(9) for j in range(3))
    assert {name for name, (_, pid) in found.items() if pid == os.getpid()} == {"3", "4"}


@forked
def test_what_is_larger_than_all_slots_passes_through_them() -> None:
    """The second process fills its slots and waits, while the first one's bytes are taken."""
    sizes = [3 * SLOTS * SLOT + 5, 2 * SLOTS * SLOT, 0, 7]

    def job(i: int) -> Generator[bytearray, None, int]:
        left = sizes[i]
        while left:
            step = min(left, 5 * SLOT // 2)
            yield bytearray(bytes([i + 1]) * step)
            left -= step
        return i

    counts = Counter[int]()

    def take(piece: memoryview) -> None:
        (value,) = set(piece)
        counts[value] += len(piece)

    assert list(in_order({str(i): partial(job, i) for i in range(4)}, take, 2)) == [(str(i), i) for i in range(4)]
    assert counts == {1: sizes[0], 2: sizes[1], 4: sizes[3]}


def fail(error: Exception) -> Bytes:
    yield b"something"
    raise error


def pass_by(piece: memoryview) -> None:
    del piece


REF = Ref("w", "F16", (1,), "/somewhere", 0, "")


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize(
    "error", [Damaged(REF), ActionFailed("w holds NaN", "a hint"), OSError(28, "full", "pack"), MemoryError("1 GB")]
)
def test_an_error_comes_back_as_it_was(error: Exception, processes: int) -> None:
    with pytest.raises(type(error)) as caught:
        list(in_order({"a": partial(fail, error)}, pass_by, processes))
    assert str(caught.value) == str(error)
    assert caught.value.__dict__ == error.__dict__


@forked
def test_a_process_that_was_killed_is_named_while_the_other_one_waits() -> None:
    def killed() -> Bytes:
        yield b"."
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    with pytest.raises(ResourceError, match=r"ended \(-9\)") as caught:
        list(in_order({"a": killed, "b": partial(by, "x", 2 * SLOTS * SLOT // 3)}, pass_by, 2))
    assert "memory" in caught.value.hint


@forked
def test_who_leaves_early_leaves_no_process_behind() -> None:
    done = in_order({str(i): partial(by, "x") for i in range(1000)}, pass_by, 2)
    _, (_, pid) = next(done)
    done.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@forked
@pytest.mark.parametrize("size", [0, SLOT])
def test_a_process_whose_parent_is_gone_ends(size: int, tmp_path: Path) -> None:
    """The parent is killed where it waits: its process says what it did, or waits for slots, and does no more jobs."""

    def job(name: str) -> Generator[bytearray, None, None]:
        time.sleep(0.02)
        (tmp_path / name).write_text("")
        if size:
            yield bytearray(size)

    parent = os.fork()
    if not parent:
        for _ in in_order({f"{i:03}": partial(job, f"{i:03}") for i in range(200)}, pass_by, 1):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    before = -1
    while before != (now := len(list(tmp_path.iterdir()))):
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
