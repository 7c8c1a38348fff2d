"""Too little memory is a matter of the machine, with a way out that changes nothing of what is learned."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from sdforge.order import Given, Order
from sdforge.run import __main__ as worker
from tests.families.workbench import Taken
from tests.run.order import order

CUDA = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
)


def end(monkeypatch: pytest.MonkeyPatch, work: Order, error: BaseException) -> dict[str, Any]:
    """Let an order meet an error; return what is said of its end."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(worker, "run", fail)
    return worker.run_reporting(work, lambda **_: None, lambda: False)


@pytest.mark.parametrize(
    ("error", "what"),
    [(CUDA, "the device"), (CPU, "this machine"), (MemoryError(), "this machine")],
)
def test_a_training_is_told_how_to_do_with_less(
    monkeypatch: pytest.MonkeyPatch, toy: Taken, pictures: Given, tmp_path: Path, error: BaseException, what: str
) -> None:
    said = end(monkeypatch, order(tmp_path, "lora", toy, pictures), error)
    assert (said["event"], said["code"], said["message"]) == ("failed", 4, f"{what} is out of memory")
    assert said["hint"] == (
        "--vram 8GB (or what there is) computes the same in smaller parts, from the last kept state on"
    )


def test_one_that_was_fitted_already_is_told_to_take_less(
    monkeypatch: pytest.MonkeyPatch, toy: Taken, pictures: Given, tmp_path: Path
) -> None:
    said = end(monkeypatch, order(tmp_path, "lora", toy, pictures, how={"vram": 10**9}), CUDA)
    assert said["hint"].startswith("a smaller --vram computes the same")


@pytest.mark.parametrize(
    ("error", "sentence", "hint"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "the disk is full", "make room"),
        (OSError(errno.EIO, "Input/output error", "x"), "Input/output error (x)", ""),
        (OSError("the server is away"), "the server is away", ""),  # as libraries raise it
    ],
)
def test_what_the_system_refuses_is_said_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, toy: Taken, pictures: Given, error: OSError, sentence: str, hint: str
) -> None:
    said = end(monkeypatch, order(Path(), "lora", toy, pictures), error)
    assert (said["event"], said["code"], said["message"]) == ("failed", 4, f"it could not go on: {sentence}")
    assert said["hint"].startswith(hint)
    assert bool(said["hint"]) == bool(hint)


def test_other_errors_are_no_matter_of_memory(
    monkeypatch: pytest.MonkeyPatch, toy: Taken, pictures: Given, tmp_path: Path
) -> None:
    said = end(monkeypatch, order(tmp_path, "lora", toy, pictures), RuntimeError("shapes differ\nat some length"))
    assert (said["code"], said["message"]) == (1, "RuntimeError: shapes differ")
