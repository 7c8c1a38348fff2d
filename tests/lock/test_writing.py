"""How the lock on the disk changes: entry by entry, one writer at a time, and only if it changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sdforge.errors import UsageError
from sdforge.lock import Lock, read_lock, update_lock
from sdforge.store.files import Lock as FileLock
from tests.lock.conftest import a_pin

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path, lock: Lock) -> Path:
    found = tmp_path / "forge.lock"
    found.write_text(lock.dump())
    return found


def update(path: Path, changes: Lock, *, replace: set[str] | None = None, known: set[str] | None = None) -> Lock:
    update_lock(path, FileLock(path.with_suffix(".guard")), changes, replace or set(), known or set())
    return read_lock(path.read_bytes(), path.name)


def test_a_new_entry_leaves_the_others_alone(path: Path, lock: Lock) -> None:
    found = update(path, Lock(targets={"r:new": {"key": "c" * 64}}))
    assert found.targets == lock.targets | {"r:new": {"key": "c" * 64}}
    assert (found.sources, found.results) == (lock.sources, lock.results)


def test_what_somebody_else_wrote_meanwhile_is_kept(path: Path, lock: Lock) -> None:
    lock.targets["other:new"] = {"key": "d" * 64}
    path.write_text(lock.dump())
    found = update(path, Lock(targets={"r:new": {"key": "c" * 64}}))
    assert {"other:new", "r:new"} <= found.targets.keys()


def test_targets_that_a_recipe_no_longer_has_are_dropped(path: Path) -> None:
    found = update(path, Lock(targets={"r:soft": {"key": "c" * 64}}), known={"r"})
    assert found.targets.keys() == {"r:soft", "other:soft"}


def test_results_stay_when_targets_go(path: Path, lock: Lock) -> None:
    assert update(path, Lock(), known={"r", "other"}).results == lock.results


def test_another_result_of_a_key_stands_beside_the_first(path: Path) -> None:
    changes = Lock()
    changes.pin(a_pin(digest="2"), replace=True)
    assert sorted(update(path, changes).pins("a" * 64)) == ["1" * 64, "2" * 64]


def test_a_retrained_result_replaces_all_of_its_key(path: Path) -> None:
    changes = Lock()
    changes.pin(a_pin(digest="2"), replace=True)
    assert sorted(update(path, changes, replace={"a" * 64}).pins("a" * 64)) == ["2" * 64]


def test_plan_keys_of_one_result_add_up(path: Path) -> None:
    changes = Lock()
    changes.pin(a_pin(plans=["e" * 64]), replace=True)
    (pin,) = update(path, changes).pins("a" * 64).values()
    assert pin.plans == ["e" * 64, "f" * 64]


def test_a_lock_that_does_not_change_is_not_written(path: Path, lock: Lock) -> None:
    before = path.stat()
    update(path, Lock(targets={"r:soft": lock.targets["r:soft"]}))
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_lock_that_is_not_there_is_made(tmp_path: Path) -> None:
    found = update(tmp_path / "forge.lock", Lock(targets={"r:new": {"key": "c" * 64}}))
    assert found.targets == {"r:new": {"key": "c" * 64}}


def test_a_device_in_its_place_is_not_read_without_end(tmp_path: Path) -> None:
    """As a repository may hold a link to one."""
    (tmp_path / "forge.lock").symlink_to("/dev/zero")
    assert update(tmp_path / "forge.lock", Lock(targets={"r:new": {"key": "c" * 64}})).targets
    assert not (tmp_path / "forge.lock").is_symlink()


def test_a_lock_that_cannot_be_read_is_not_overwritten(path: Path) -> None:
    path.write_text("<<<<<<< HEAD\n")
    with pytest.raises(UsageError):
        update(path, Lock())
    assert path.read_text() == "<<<<<<< HEAD\n"


def test_the_guard_is_free_after_a_failure(path: Path) -> None:
    path.write_text("<<<<<<< HEAD\n")
    with pytest.raises(UsageError):
        update(path, Lock())
    assert FileLock(path.with_suffix(".guard")).acquire(wait=False)


WRITER = """
import sys
from pathlib import Path
from sdforge.lock import Lock, update_lock
from sdforge.store.files import Lock as FileLock
path, name = Path(sys.argv[1]), sys.argv[2]
for i in range(10):
    guard = FileLock(path.with_suffix(".guard"))
    update_lock(path, guard, Lock(targets={f"{name}:t{i}": {"key": "c" * 64}}), set(), set())
"""


def test_writers_at_the_same_time_lose_nothing(path: Path, lock: Lock) -> None:
    names = ["w1", "w2", "w3", "w4"]
    running = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], cwd=ROOT) for name in names]
    assert [process.wait(timeout=120) for process in running] == [0] * 4
    found = read_lock(path.read_bytes(), path.name).targets
    assert found.keys() == lock.targets.keys() | {f"{name}:t{i}" for name in names for i in range(10)}
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("fault", ["kill:1", "EIO:1"])
def test_a_writer_that_dies_leaves_the_old_lock(path: Path, fault: str) -> None:
    before = path.read_bytes()
    environment = {"FORGE_FAULT": fault, "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(path), "w"], cwd=ROOT, env=environment, check=False, capture_output=True
    )
    assert done.returncode != 0
    assert path.read_bytes() == before
