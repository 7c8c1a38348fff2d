"""The largest numbers and their ranks: by the processor and by a device, which do so exactly and alike.

The code that is for a device runs on the processor here, which torch also calls `cpu:0`; `test_cuda` runs it on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdforge import selection
from sdforge.method import module_of
from sdforge.order import Computation, Order, Outcome
from sdforge.run import formula
from sdforge.selection import largest, ranks, selecting_on, why_not
from tests.families.workbench import keep, reference
from tests.merges.test_merge_contract import MERGES

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
# of each type zero, the least number, a denormal and a large one: so few that most are equal to others
FEW: dict[Any, list[float]] = {
    np.float32: [0.0, 2.0**-149, 2.0**-130, 0.5, 1.0, 2.0, 3e38],
    np.float64: [0.0, 2.0**-1074, 2.0**-1030, 0.5, 1.0, 2.0, 1e308],
}
PLACES = st.lists(st.integers(0, 6), min_size=1, max_size=24)
DEVICES = ("cpu", "cpu:0")


def numbers(places: list[int], dtype: Any) -> Tensor:
    return torch.from_numpy(np.array(FEW[dtype], dtype)[places])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """What selects; it must not fail."""
    with selecting_on(request.param, pytest.fail):
        yield request.param


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What is said of a device that does not select, which is another one than that of other tests."""
    why_not.cache_clear()
    found: list[str] = []
    with selecting_on("cpu:0", found.append):
        yield found
    why_not.cache_clear()


@pytest.mark.parametrize("dtype", FEW)
@PROPERTY
@given(places=PLACES, count=st.integers(0, 25))
def test_a_device_chooses_those_that_a_stable_sort_puts_first(places: list[int], count: int, dtype: Any) -> None:
    magnitudes = numbers(places, dtype)
    expected = np.zeros(len(places), bool)
    expected[np.argsort(-magnitudes.numpy(), kind="stable")[:count]] = True
    for name in DEVICES:
        with selecting_on(name, pytest.fail):
            assert largest(Tensor.abs, count, magnitudes).tolist() == expected.tolist(), name


@pytest.mark.parametrize("dtype", FEW)
@PROPERTY
@given(places=PLACES, rows=st.integers(1, 3))
def test_a_device_ranks_as_a_stable_sort_does(places: list[int], rows: int, dtype: Any) -> None:
    magnitudes = numbers(places * rows, dtype).reshape(rows, -1)
    expected = magnitudes.numpy().argsort(axis=1, kind="stable").argsort(axis=1)
    for name in DEVICES:
        with selecting_on(name, pytest.fail):
            assert ranks(magnitudes).tolist() == expected.tolist(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 50_000, 99_999, 139_999])
def test_many_numbers_of_every_size_are_told_apart(count: int, dtype: torch.dtype, device: str) -> None:
    draw = np.random.RandomState(0)
    spread = np.abs(draw.standard_normal(140_000)) * 2.0 ** draw.randint(-60, 60, 140_000)
    magnitudes = torch.from_numpy(spread).to(dtype)
    magnitudes[::3] = magnitudes[0]
    expected = np.zeros(140_000, bool)
    expected[np.argsort(-magnitudes.numpy(), kind="stable")[:count]] = True
    assert np.array_equal(largest(Tensor.abs, count, magnitudes).numpy(), expected), device


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_says_whether_it_selects(name: str) -> None:
    """What asks for a device is told by it (`resources.selects`)."""
    module = module_of("merges", name)
    assert any(hasattr(module, each) for each in ("largest", "ranks", "kept")) == getattr(module, "SELECTS", False)


# -- a device that does not serve --------------------------------------------------------------------------------------


def choose() -> None:
    found = largest(Tensor.abs, 2, torch.tensor([1.0, -3.0, 3.0, -1.0, 3.0]))
    assert found.tolist() == [False, True, True, False, False]


def test_a_device_that_chooses_one_number_otherwise_is_not_used(
    monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    there = selection._largest_there

    def wrong(device: torch.device, numbers: Iterator[Tensor], count: int) -> Tensor:
        found = there(device, numbers, count)
        if count == 1:  # as if of equal numbers the last were chosen
            found = found.roll(int(found.nonzero()[0]) + 1)
        return found

    monkeypatch.setattr(selection, "_largest_there", wrong)
    choose()
    assert said == ["cpu:0 leaves choosing and ranking to the processor: it selects otherwise than the processor"]


def test_a_device_that_ranks_equal_numbers_in_another_order_is_not_used(
    monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    def wrong(_: torch.device, magnitudes: Tensor) -> Tensor:
        return selection._ranks_here(magnitudes.flip(1)).flip(1)

    monkeypatch.setattr(selection, "_ranks_there", wrong)
    assert ranks(torch.tensor([[1.0, 0.0, 1.0]])).tolist() == [[1, 0, 2]]
    assert said == ["cpu:0 leaves choosing and ranking to the processor: it selects otherwise than the processor"]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "it has too little memory for some"),
        (RuntimeError("CUDA error: unspecified launch failure\nmore"), "CUDA error: unspecified launch failure"),
    ],
)
def test_where_a_device_fails_at_one_tensor_the_processor_chooses_of_it(
    error: RuntimeError, why: str, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    assert why_not("cpu:0") == ""
    there, failing = selection._largest_there, [True, False]

    def once(device: torch.device, numbers: Iterator[Tensor], count: int) -> Tensor:
        if failing.pop(0):
            raise error
        return there(device, numbers, count)

    monkeypatch.setattr(selection, "_largest_there", once)
    choose()
    choose()
    assert failing == []
    (only,) = said
    assert why in only


def test_a_device_that_is_not_there_is_named_with_the_reason_as_long_as_it_is_wished_for() -> None:
    found: list[str] = []
    with selecting_on("cuda:9", found.append):
        choose()
    choose()
    (only,) = found
    assert only.startswith("cuda:9 leaves choosing and ranking to the processor: ")


# -- in the worker -----------------------------------------------------------------------------------------------------


@pytest.fixture
def selecting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Computation]:
    """A large tensor and a small one by every merge that selects."""
    monkeypatch.setattr(formula, "LARGE", 100)
    draw, found = torch.Generator().manual_seed(0), []
    given = {f"{i} {rows}": torch.randn(rows, 16, generator=draw).half() for i in range(3) for rows in (4, 8)}
    taken = keep(tmp_path, {"unet": given})
    refs = {row.name: reference(row, taken.files) for row in taken.tables["unet"]}
    for name in [name for name in MERGES if getattr(module_of("merges", name), "SELECTS", False)]:
        parameters: dict[str, Any] = {"sce": {"select_topk": 0.3}, "della": {"tensor": "x"}}.get(name, {})
        for rows in (4, 8):
            inputs = tuple(refs[f"{i} {rows}"] for i in range(3))
            found.append(Computation("unet", f"{name} {rows}", "F16", (rows, 16), name, parameters, inputs))
    return found


def made(work: Path, selecting: list[Computation], device: str, told: list[dict[str, Any]]) -> Outcome:
    work.mkdir()
    asked = Order("", "", "ties", "merges", "sd15", {}, str(work), compute=selecting, how={"device": device})
    return formula.run_formula(asked, lambda **event: told.append(event))


def test_merges_have_the_same_bytes_by_a_device_which_only_the_large_tensors_open(
    selecting: list[Computation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes are forked for the others, and could not use what is open here."""
    here = made(tmp_path / "here", selecting, "cpu", [])
    monkeypatch.setattr(formula, "SMALL", 0)
    monkeypatch.setattr(formula, "_processors", lambda: 2)
    seen = tmp_path / "seen"
    by_device = selection._by_device

    def watched(select: Any) -> Tensor | None:
        found = by_device(select)
        by = "processor" if found is None else "device"
        with seen.open("a") as file:
            file.write(f"by the {by} {'here' if os.getpid() == parent else 'there'}\n")
        return found

    parent = os.getpid()
    monkeypatch.setattr(selection, "_by_device", watched)
    there = made(tmp_path / "there", selecting, "cpu:0", [])
    assert there.components == here.components  # their digests among them
    assert set(seen.read_text().splitlines()) == {"by the device here", "by the processor there"}


def test_what_a_device_leaves_to_the_processor_is_said_once(selecting: list[Computation], tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    found = made(tmp_path / "there", selecting, "cuda:9", told)
    (remark,) = [event["remark"] for event in told if "remark" in event]
    assert remark.startswith("cuda:9 leaves choosing and ranking to the processor")
    assert found.components == made(tmp_path / "here", selecting, "cpu", []).components
