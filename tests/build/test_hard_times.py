"""A cache that cannot be written to, clocks that jump, several builds and clean-ups at once."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import FORGE, METHODS, Project
from tests.quick import Quick
from tests.survival import Whole, leftovers

CENTURY = 100 * 365 * 86_400  # seconds


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let nobody write below a folder: by a mount for root, whom no permission stops, else by permissions."""
    if os.geteuid() == 0:
        bind = ["mount", "--bind", str(folder), str(folder)]
        if subprocess.run(bind, check=False, capture_output=True).returncode:
            pytest.skip("root that may not mount")
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    paths = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    for path in paths:
        path.chmod(modes[path] & 0o555)
    try:
        yield
    finally:
        for path in paths:
            path.chmod(modes[path])


def test_a_warm_cache_serves_though_it_cannot_be_written_to(whole: Whole, quick: Quick, tmp_path: Path) -> None:
    root = whole.copy(tmp_path / "project")
    assert quick.forge(root, "build").code == 0  # a copy's files are new to it
    with read_only(root / "cache"):
        ran = quick.forge(root, "build")
        assert (ran.code, "nothing to do" in ran.out) == (0, True), ran.err
        assert quick.forge(root, "verify").code == 0
    assert whole.differences(root) == []


def test_a_cache_that_cannot_be_written_to_ends_a_build_with_one_sentence(
    whole: Whole, quick: Quick, tmp_path: Path
) -> None:
    root = whole.copy(tmp_path / "project")
    recipe = root / "recipes" / "toy.toml"
    recipe.write_text(recipe.read_text().replace("steps = 6", "steps = 7"))
    with read_only(root / "cache"):
        ran = quick.forge(root, "build")
        assert ran.code == 4, ran.out + ran.err
        assert "Traceback" not in ran.out + ran.err
        assert quick.forge(root, "doctor").code == 4
    assert quick.forge(root, "build").code == 0


def test_a_project_that_was_moved_is_known_to_the_cache_that_it_shares(
    whole: Whole, quick: Quick, tmp_path: Path
) -> None:
    """Its builds have nothing to do, and still nobody else's clean-up may take what it needs."""
    cache = {"FORGE_CACHE": str(tmp_path / "shared")}
    root, other = whole.clone(tmp_path / "project"), whole.clone(tmp_path / "other")
    for recipe in (other / "recipes").iterdir():
        recipe.unlink()
    recipe = root / "recipes" / "toy.toml"
    recipe.write_text(recipe.read_text().partition("[preset]")[0])  # files would be written at the new place
    assert quick.forge(root, "build", **cache).code == 0
    moved = root.rename(tmp_path / "moved")
    ran = quick.forge(moved, "build", **cache)
    assert (ran.code, "nothing to do" in ran.out) == (0, True), ran.out + ran.err
    assert quick.forge(other, "clean", "--trained", **cache).code == 0
    assert "nothing to do" in quick.forge(moved, "build", **cache).out


@pytest.mark.parametrize("jump", [-30 * 365 * 86_400, CENTURY], ids=["long ago", "in a hundred years"])
def test_a_clock_that_jumps_hides_no_edit(whole: Whole, quick: Quick, tmp_path: Path, jump: float) -> None:
    root = whole.clone(tmp_path / "project")
    caption = root / "drawings" / "0.txt"
    at = caption.stat().st_mtime + jump
    for path in [*(root / "drawings").iterdir(), *(root / "base").rglob("*")]:
        os.utime(path, (at, at))
    assert quick.forge(root, "build", "--json").built == ["a", "preset.export"]
    assert quick.forge(root, "build", "--json").built == []
    caption.write_text(caption.read_text().replace("red", "RED"))  # of the same size, at the same time
    os.utime(caption, (at, at))
    assert quick.forge(root, "build", "--json").built == ["a", "preset.export"]
    caption.write_text(caption.read_text().replace("RED", "red"))
    os.utime(caption, (at, at))
    assert quick.forge(root, "build", "--json").built == []
    assert whole.differences(root) == ["forge.lock"]  # it has kept the result of the edit


def test_builds_and_clean_ups_at_once_do_no_harm_and_no_work_twice(whole: Whole, quick: Quick, tmp_path: Path) -> None:
    one, two = whole.clone(tmp_path / "one"), whole.clone(tmp_path / "two")
    cache, log = tmp_path / "cache", tmp_path / "log"
    environment = {"FORGE_CACHE": str(cache), "REHEARSAL_LOG": str(log), "REHEARSAL_PAUSE": "0.03"}
    builds = [quick.start(root, "build", "--json", **environment) for root in (one, two, one, two)]
    cleans = [quick.start(one, "clean", "--json", **environment) for _ in range(3)]
    assert {running.wait().code for running in cleans} <= {0, 5}
    assert [running.wait().code for running in builds] == [0] * 4
    steps = [line for line in log.read_text().splitlines() if line.startswith("step")]
    assert len(steps) == len(set(steps)) == 6
    assert whole.differences(one) == whole.differences(two) == []
    assert leftovers(one, cache) == []


def test_a_build_leaves_nothing_of_one_that_was_killed_beside_it(whole: Whole, quick: Quick, tmp_path: Path) -> None:
    """The next ones may find nothing to do, and sweep nothing then."""
    root, cache, log = whole.clone(tmp_path / "one"), tmp_path / "cache", tmp_path / "log"
    log.touch()
    environment = {"FORGE_CACHE": str(cache), "REHEARSAL_LOG": str(log), "REHEARSAL_PAUSE": "0.15"}
    builds = {str(each.pid): each for each in (quick.start(root, "build", "--json", **environment) for _ in range(2))}
    until = time.monotonic() + 30
    while log.read_text().count("step") < 3:  # the second of three targets is at work, and both have swept
        assert time.monotonic() < until
        time.sleep(0.01)
    (place,) = cache.glob("v1/tmp/*-*-*")
    killed = place.name.split("-")[1]
    os.kill(int(killed), signal.SIGKILL)
    assert builds.pop(killed).wait().code == -signal.SIGKILL
    assert [each.wait().code for each in builds.values()] == [0]
    assert leftovers(root, cache) == []


def test_a_cache_that_is_deleted_is_made_anew(whole: Whole, quick: Quick, tmp_path: Path) -> None:
    root = whole.copy(tmp_path / "project")
    shutil.rmtree(root / "cache")
    assert quick.forge(root, "build", "--json").built == ["a", "preset.export"]
    assert whole.differences(root) == []


@pytest.mark.parametrize("command", [["list"], ["list", "--json"], ["build", "nothing", "--json"]])
def test_words_that_cannot_be_written_are_no_traceback(project: Project, command: list[str]) -> None:
    """Standard output lies on a full disk; standard error says so."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [FORGE, *command], cwd=project.root, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode in (2, 4)
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_the_caller_has_closed_are_nobody_elses(project: Project, closed: str) -> None:
    """As in a service: what is opened next would be written to in their place."""
    command, own = f"{shlex.quote(str(FORGE))} build {closed}", {"FORGE_METHODS": str(METHODS), "OMP_NUM_THREADS": "1"}
    subprocess.run(["sh", "-c", command], cwd=project.root, capture_output=True, check=True, env=os.environ | own)
    assert project.output.is_file()
    assert "everything is reused" in project.forge("build").out
    assert not (project.root / ".forge" / "log" / "unforeseen.txt").exists()
