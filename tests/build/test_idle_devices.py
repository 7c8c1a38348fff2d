"""A merge that chooses or ranks many numbers has a device that is idle, and waits for none."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdforge import resources
from sdforge.build import Build
from sdforge.devices import device_lock
from sdforge.under_way import Options
from tests.build.inline import Bench, Silent

RECIPE = """\
[ties.trimmed]
base = "base"
checkpoints = ["ink"]

[weighted_sum.soft]
checkpoints = ["base", "ink"]
weights = [0.6, 0.4]

[scale.half]
a = "trimmed"
weight = 0.5
"""
Devices = Callable[[str], dict[str, str]]


@pytest.fixture
def devices(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Devices:
    """Return target → the device that its order names, where cuda:7 is wished for. Any tensor counts as large."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(resources, "LARGE", 0)
    monkeypatch.setattr(resources, "WORTH_A_DEVICE", 1)
    bench.recipe(RECIPE)

    def build(target: str) -> dict[str, str]:
        session = bench.session()
        bench.orders.clear()
        summary = Build(session, bench, Silent(), Options(device="cuda:7")).run(session.resolve([target]))
        assert not summary.failed
        return {name.partition(":")[2]: order.how["device"] for name, order in bench.orders.items()}

    return build


def test_a_merge_that_selects_has_the_idle_device_and_gives_it_back(devices: Devices, bench: Bench) -> None:
    assert devices("r:trimmed") == {"trimmed": "cuda:7"}
    with device_lock("cuda:7") as lock:
        assert lock.acquire(wait=False)
    assert bench.states("r:trimmed")["trimmed"] == "reuse"  # the device is in no key


def test_a_merge_that_selects_on_the_way_has_it_too_and_any_other_has_not(devices: Devices) -> None:
    assert devices("r:half") == {"half": "cuda:7"}
    assert devices("r:soft") == {"soft": "cpu"}


def test_it_does_not_wait_for_a_device_that_is_at_work(devices: Devices) -> None:
    with device_lock("cuda:7") as lock:
        lock.acquire(wait=False)
        assert devices("r:trimmed") == {"trimmed": "cpu"}


@pytest.mark.parametrize("when", ["submit", "poll"])
def test_what_breaks_off_leaves_no_lock_behind(bench: Bench, devices: Devices, when: str) -> None:
    """In a notebook the next build is of the same process, which would wait for itself."""

    class Broken:
        def submit(self, *_: object) -> Broken:
            return self if when == "poll" else self.fail()

        def fail(self) -> Any:
            raise OSError(errno.EAGAIN, "no more processes")

        def fileno(self) -> int:
            return -1

        poll = fail
        kill = close = expect = lambda _: None

    session = bench.session()
    with pytest.raises(OSError, match="no more processes"):
        Build(session, Broken(), Silent(), Options(device="cuda:7")).run(session.resolve(["r:trimmed"]))
    assert list(session.store.temporary.iterdir()) == []
    session.store.close()
    assert devices("r:trimmed") == {"trimmed": "cuda:7"}


def test_for_few_numbers_no_device_is_taken(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "WORTH_A_DEVICE", 1 << 27)
    assert devices("r:trimmed") == {"trimmed": "cpu"}
