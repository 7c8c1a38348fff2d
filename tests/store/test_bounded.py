"""A bounded cache gives up first what costs least to make again, and never what nobody could make again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdforge.cli import main
from sdforge.lock import Lock, Pin
from sdforge.store import Store
from tests.store.conftest import make_result

OLD, NEW, TRAINED, DRAWN, PINNED = "aa" * 32, "bb" * 32, "cc" * 32, "dd" * 32, "ee" * 32
SIZE = 400_000  # bytes of every pack
Clean = Callable[..., dict[str, Any]]


@pytest.fixture
def clean(root: Path, capsys: pytest.CaptureFixture[str]) -> Clean:
    """Run `forge clean` with a bound; return what was collected. A lock pins all, so that nothing is unreached."""

    def run(bound: str, *arguments: str) -> dict[str, Any]:
        lock = Lock()
        for key in (OLD, NEW, TRAINED, DRAWN):
            lock.pin(Pin(key, "0" * 64), replace=True)
        (root / "forge.lock").write_text(lock.dump())
        (root / "forge.toml").write_text(f'[cache]\nmax_size = "{bound}"\n')
        capsys.readouterr()
        assert main(["-C", str(root), "clean", "--json", *arguments]) == 0
        said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return next((each for each in said if each["event"] == "bounded"), {})

    return run


@pytest.fixture
def filled(store: Store) -> Store:
    """Two merges, a training and a preview of 400 kB with three objects as large, and latents of 400 kB: 6.8 MB."""
    make_result(store, OLD, os.urandom(SIZE), kind="checkpoint", grade="A", made=1.0)
    make_result(store, NEW, os.urandom(SIZE), kind="checkpoint", grade="A", made=2.0)
    make_result(store, TRAINED, os.urandom(SIZE), made=0.0)
    make_result(store, DRAWN, os.urandom(SIZE), kind="pictures", made=0.0)
    path = store.derived() / "ab" / "latents.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(SIZE))
    store.close()
    return store


def kept(store: Store) -> set[str]:
    return {p.parent.name for p in (store.root / "results").glob("*/*/*.json")}


def states(store: Store, key: str, *, age: float) -> Path:
    folder = store.states(key)
    folder.mkdir(parents=True)
    (folder / "4.json").write_text("{}")
    (folder / "4.safetensors").write_bytes(bytes(SIZE))
    for path in folder.iterdir():
        os.utime(path, (time.time() - age,) * 2)
    return folder


def test_within_the_bound_nothing_goes(filled: Store, clean: Clean) -> None:
    assert clean("7 MB")["removed"] == {}
    assert kept(filled) == {OLD, NEW, TRAINED, DRAWN}


@pytest.mark.parametrize(
    ("bound", "removed", "left"),
    [
        ("6.55 MB", {"derived caches": 1}, {OLD, NEW, TRAINED, DRAWN}),
        ("4.95 MB", {"derived caches": 1, "results of class A": 1}, {NEW, TRAINED, DRAWN}),
        ("3.35 MB", {"derived caches": 1, "results of class A": 2}, {TRAINED, DRAWN}),
        ("1.75 MB", {"derived caches": 1, "results of class A": 2, "previews": 1}, {TRAINED}),
        ("0.1 MB", {"derived caches": 1, "results of class A": 2, "previews": 1}, {TRAINED}),
    ],
)
def test_what_is_made_again_most_easily_goes_first(
    filled: Store, clean: Clean, bound: str, removed: dict[str, int], left: set[str]
) -> None:
    said = clean(bound)
    assert said["removed"] == removed
    assert kept(filled) == left
    assert said["bytes"] >= SIZE * sum(removed.values())
    store = Store(filled.root.parent)
    assert all(store.holds(result) for _, result in store.results())
    assert [result.digest for result in store.known(OLD).results] == (
        [] if OLD not in left else [*kept_digests(store, OLD)]
    )


def kept_digests(store: Store, key: str) -> set[str]:
    return {result.digest for _, result in store.results() if result.key == key}


def test_a_dry_run_says_the_same_and_removes_nothing(filled: Store, clean: Clean) -> None:
    said = clean("3.35 MB", "--dry-run")
    assert kept(filled) == {OLD, NEW, TRAINED, DRAWN}
    assert clean("3.35 MB")["removed"] == said["removed"]


def test_what_another_projects_lock_names_stays(filled: Store, clean: Clean, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "forge.toml").write_text("")
    (other / "forge.lock").write_text(Lock(targets={"r:soft": {"key": OLD}}).dump())
    filled.register(other)
    filled.close()
    clean("0.1 MB")
    assert kept(filled) == {OLD, TRAINED}


def test_an_unfinished_training_is_left_alone_for_a_day(filled: Store, clean: Clean) -> None:
    young, idle = states(filled, "11" * 32, age=3600), states(filled, "22" * 32, age=100_000)
    assert clean("0.1 MB")["removed"]["unfinished train states"] == 1
    assert list(young.iterdir())
    assert not list(idle.iterdir())


def test_while_a_build_runs_nothing_is_collected(filled: Store, root: Path) -> None:
    from sdforge.bounded import keep_bounded
    from sdforge.session import open_session

    (root / "forge.toml").write_text('[cache]\nmax_size = "1 MB"\n')
    guard = filled.guard()
    guard.share(wait=True)
    keep_bounded(open_session(root), as_json=True)
    guard.release()
    assert kept(filled) == {OLD, NEW, TRAINED, DRAWN}


def test_the_bound_of_this_machine_goes_first(root: Path) -> None:
    from sdforge.session import open_session

    (root / "forge.toml").write_text('[cache]\nmax_size = "50GB"\n')
    assert open_session(root).project.max_cache == 50 * 10**9
    (root / "forge.local.toml").write_text('[cache]\nmax_size = "2 GiB"\n')
    assert open_session(root).project.max_cache == 2 * 2**30
