"""A fault at any publish of a build costs nothing but time: no wrong byte, no half file, nothing to mend by hand."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdforge.run.states import save_state
from tests import calls
from tests.build.inline import Bench
from tests.quick import WATCHED, Quick
from tests.survival import Whole, leftovers

KINDS = ("kill", "late-kill", "EIO", "ENOSPC", "late-EIO", "late-ENOSPC")
SUM = '[weighted_sum.soft]\ncheckpoints = ["base", "ink"]\nweights = [0.6, 0.4]\n[preset]\ncheckpoint = "soft"\n'
PUBLISHES = 28  # of a whole build: tables, states, preimages, results, aliases, outputs and the lock


@pytest.fixture
def root(whole: Whole) -> Iterator[Path]:
    """A clone that nobody has built; in memory where that is possible, since it is flushed again and again."""
    place = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    yield whole.clone(Path(place) / "project")
    shutil.rmtree(place)


def test_a_build_publishes_as_often_as_this_file_thinks(root: Path, quick: Quick) -> None:
    assert quick.forge(root, "build", "--json", FORGE_FAULT=f"kill:{PUBLISHES}").code == -9
    shutil.rmtree(root / "cache")
    shutil.rmtree(root / "out")
    (root / "forge.lock").unlink(missing_ok=True)
    assert quick.forge(root, "build", "--json", FORGE_FAULT=f"kill:{PUBLISHES + 1}").code == 0


@pytest.mark.parametrize("at", range(1, PUBLISHES + 1))
def test_a_fault_at_any_publish_costs_only_time(root: Path, whole: Whole, quick: Quick, at: int) -> None:
    """One kind of fault at each; `benchmarks/reliability.py` has all kinds at all of them."""
    kind = KINDS[at % len(KINDS)]
    ran = quick.forge(root, "build", "--json", FORGE_FAULT=f"{kind}:{at}")
    assert ran.code == (-9 if kind.endswith("kill") else 4), ran.out
    assert "Traceback" not in ran.out + ran.err
    assert quick.forge(root, "build", "--json").code == 0
    assert whole.differences(root) == []
    assert leftovers(root) == []


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("at", [1, 5, 9, 13, 17, 21])
def test_a_disk_that_stays_broken_ends_the_build_with_one_sentence(
    root: Path, whole: Whole, quick: Quick, at: int, kind: str
) -> None:
    ran = quick.forge(root, "build", FORGE_FAULT=f"{kind}:{at}+")
    assert ran.code == 4, ran.out + ran.err
    assert "Traceback" not in ran.out + ran.err
    assert ("the disk is full" if kind == "ENOSPC" else "planted: Input/output error") in ran.out + ran.err
    assert quick.forge(root, "build", "--json").code == 0
    assert whole.differences(root) == []
    assert leftovers(root) == []


@pytest.mark.skipif(bool(calls.lacks()), reason="system calls cannot be watched here")
@pytest.mark.parametrize("name", ["fsync", "mkdir", "openat", "pwrite64", "rename", "unlink", "write"])
def test_a_system_call_that_fails_costs_only_time(root: Path, whole: Whole, quick: Quick, name: str) -> None:
    """One in the midst of a build; `benchmarks/reliability` has all of them. Only the index uses pwrite64."""
    running = quick.start(root, "build", "--json", **{WATCHED: name})
    counts = running.watch(lambda _, at: "EIO" if at == 11 else "")
    ran = running.wait()
    assert counts[name] >= 11
    expected = {"pwrite64": {0}, "fsync": {4}}  # a file that could not be flushed is not kept
    assert ran.code in expected.get(name, {0, 4}), ran.out + ran.err
    assert "Traceback" not in ran.out + ran.err
    assert ran.code or whole.differences(root) == []
    assert quick.forge(root, "build", "--json").code == 0
    assert whole.differences(root) == []
    assert leftovers(root) == []


@pytest.mark.skipif(bool(calls.lacks()), reason="system calls cannot be watched here")
def test_a_kill_between_two_system_calls_costs_only_time(root: Path, whole: Whole, quick: Quick) -> None:
    running = quick.start(root, "build", "--json", **{WATCHED: "rename fsync"})
    counts = running.watch(lambda name, at: "kill" if (name, at) == ("fsync", 30) else "")
    assert running.wait().code == -9
    assert counts["fsync"] == 30
    assert quick.forge(root, "build", "--json").code == 0
    assert whole.differences(root) == []


def test_what_a_build_keeps_lies_in_folders_whose_names_are_flushed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power loss could take a folder that was new, with all that was flushed in it."""
    loose: set[Path] = set()
    mkdir, fsync = os.mkdir, os.fsync

    def note_mkdir(path: str | Path, *rest: int) -> None:
        mkdir(path, *rest)
        loose.add(Path(path))

    def note_fsync(fd: int) -> None:
        fsync(fd)
        flushed = Path(f"/proc/self/fd/{fd}").readlink()
        loose.difference_update([path for path in loose if path.parent == flushed])

    monkeypatch.setattr(os, "mkdir", note_mkdir)
    monkeypatch.setattr(os, "fsync", note_fsync)
    bench.recipe(SUM)
    (bench.root / "out/r").mkdir(parents=True)
    (bench.root / "out/r/r.safetensors").write_text("a person's")
    bench.build()
    save_state(bench.root / "cache/v1/states/ab/key", 1, {}, {})
    kept = {path for path in loose if path.is_dir() and path.name not in ("recipes", "locks", "roots")}
    assert kept == set()
    assert len(list((bench.root / "cache/v1/objects").iterdir())) > 1
    assert (bench.root / "out/r/r.safetensors").is_file()
    assert (bench.root / "out/.replaced/r/r.safetensors").read_text() == "a person's"


def test_a_chain_of_kills_comes_to_its_end(root: Path, whole: Whole, quick: Quick) -> None:
    kills = 0
    while quick.forge(root, "build", "--json", FORGE_FAULT="kill:4").code == -9:
        kills += 1
        assert kills < PUBLISHES
    assert kills > 2
    assert whole.differences(root) == []
    assert leftovers(root) == []
