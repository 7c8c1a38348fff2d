"""DESIGN §4.4's table where a remote cache has the pinned result D, or nothing. Without remotes: `test_pins.py`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.build.test_planted_bytes import REMOTE
from tests.quick import Quick
from tests.remotes.server import CacheServer, caching
from tests.survival import Whole, damages

TRAINED = "start toy:a"


@dataclass
class Machine:
    """A project, and what is between it and the remote cache."""

    root: Path
    quick: Quick

    def forge(self, *arguments: str, code: int = 0) -> str:
        """Run a command; return what it said and whether it trained."""
        log = self.root / "rehearsal.log"
        log.unlink(missing_ok=True)
        ran = self.quick.forge(self.root, *arguments)
        assert ran.code == code, ran.out + ran.err
        return ran.out + ran.err + (log.read_text() if log.exists() else "")

    @property
    def output(self) -> bytes:
        return (self.root / "out/toy/toy.safetensors").read_bytes()

    @property
    def lock(self) -> bytes:
        return (self.root / "forge.lock").read_bytes()

    def empty_remote(self) -> None:
        shutil.rmtree(self.root / "shared")


@pytest.fixture(scope="module")
def made(whole: Whole, quick: Quick, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A project with D, which its remote cache has too; `there` beside it came out as D1."""
    place = tmp_path_factory.mktemp("pins and remotes")
    here, there = whole.clone(place / "here"), whole.clone(place / "there")
    for root in (here, there):
        with (root / "forge.toml").open("a") as file:
            file.write(REMOTE)
    (there / "forge.local.toml").write_text("[run]\nthreads = 2\n")  # on which rehearsals come out differently
    assert quick.forge(here, "build", "--remote=write").code == 0
    assert quick.forge(there, "build", "--remote=off").code == 0
    shutil.copytree(here / "shared", there / "shared")
    shutil.copy(here / "forge.lock", there)
    return Whole(here)


@pytest.fixture
def there(made: Whole, quick: Quick, tmp_path: Path) -> Machine:
    """Pinned D; the store has only D1."""
    shutil.copytree(made.root.with_name("there"), tmp_path / "there")
    return Machine(tmp_path / "there", quick)


@pytest.fixture
def fresh(made: Whole, quick: Quick, tmp_path: Path) -> Machine:
    """Pinned D; nothing here."""
    root = made.clone(tmp_path / "fresh")
    shutil.copy(made.root / "forge.lock", root)
    return Machine(root, quick)


@pytest.fixture
def damaged(made: Whole, quick: Quick, tmp_path: Path) -> Machine:
    """Pinned D; its bytes in the store are damaged."""
    root = made.copy(tmp_path / "damaged")
    for path in (root / "cache/v1/objects").glob("*/*"):
        if path.read_bytes()[8:9] == b"{":
            damages()["flip"](path, path)
    shutil.rmtree(root / "out")
    return Machine(root, quick)


def test_another_result_is_reused_and_said_to_differ(there: Machine) -> None:
    output, lock = there.output, there.lock
    said = there.forge("build")
    assert "differs" in said
    assert TRAINED not in said
    assert (there.output, there.lock) == (output, lock)


@pytest.mark.parametrize("command", ["fetch", "pull"])
def test_fetch_and_pull_look_for_the_pinned_one(there: Machine, made: Whole, command: str) -> None:
    there.forge(command)
    assert TRAINED not in there.forge("build")
    assert made.differences(there.root) == []


def test_another_result_gives_way_to_the_pinned_one_under_locked(there: Machine, made: Whole) -> None:
    assert TRAINED not in there.forge("build", "--locked")
    assert made.differences(there.root) == []


def test_another_result_is_refused_under_locked_where_the_pinned_one_is_not_to_be_had(there: Machine) -> None:
    there.empty_remote()
    assert "is not to be had" in there.forge("build", "--locked", code=3)


@pytest.mark.parametrize("locked", [[], ["--locked"]], ids=["build", "locked"])
def test_nothing_here_is_fetched(fresh: Machine, made: Whole, locked: list[str]) -> None:
    assert TRAINED not in fresh.forge("build", *locked)
    assert made.differences(fresh.root) == []


def test_nothing_here_and_nothing_there(fresh: Machine, made: Whole) -> None:
    fresh.empty_remote()
    assert "is not to be had" in fresh.forge("build", "--locked", code=3)
    assert "the pinned result is not to be had" in fresh.forge("plan")
    assert TRAINED in fresh.forge("build")
    assert made.differences(fresh.root) == []


def test_retraining_asks_no_remote_for_what_it_replaces(fresh: Machine, made: Whole) -> None:
    assert TRAINED in fresh.forge("build", "--retrain", "a")
    assert made.differences(fresh.root) == []


def test_what_is_not_pinned_is_not_believed(fresh: Machine, made: Whole) -> None:
    (fresh.root / "forge.lock").unlink()
    assert "the lock" in fresh.forge("build", "--locked", code=3)
    assert TRAINED in fresh.forge("build")
    assert made.differences(fresh.root) == []


@pytest.mark.parametrize("locked", [[], ["--locked"]], ids=["build", "locked"])
def test_what_is_damaged_is_fetched(damaged: Machine, made: Whole, locked: list[str]) -> None:
    assert TRAINED not in damaged.forge("build", *locked)
    assert made.differences(damaged.root) == []
    assert any((damaged.root / "cache/v1/quarantine").iterdir())


def test_what_is_damaged_and_not_to_be_had_is_refused(damaged: Machine) -> None:
    damaged.empty_remote()
    assert "--retrain" in damaged.forge("build", code=3)


def test_two_pins_are_refused_whatever_the_remote_has(fresh: Machine) -> None:
    text = fresh.lock.decode()
    (digest,) = {line.split(".")[2].rstrip("]") for line in text.splitlines() if line.startswith("[result.")}
    table = text[text.index("[result.") :].replace(digest, "0" * 64)
    (fresh.root / "forge.lock").write_text(f"{text}\n{table}")
    said = fresh.forge("build", code=3)
    assert digest[:12] in said
    assert "0" * 12 in said


def test_offline_opens_no_line(fresh: Machine, made: Whole) -> None:
    with caching(CacheServer()) as side:
        path = fresh.root / "forge.toml"
        path.write_text(path.read_text().replace('"shared"', f'"{side.url}"'))
        fresh.forge("plan", "--offline")
        assert TRAINED in fresh.forge("build", "--offline")
        assert side.asked == []
    assert made.differences(fresh.root) == []


def test_offline_a_fetch_looks_into_a_folder_and_names_what_only_a_server_has(fresh: Machine, made: Whole) -> None:
    path = fresh.root / "forge.toml"
    with caching(CacheServer()) as side:
        text = path.read_text()
        path.write_text(text.replace('"shared"', f'"{side.url}"'))
        said = fresh.forge("fetch", "--offline", code=4)
        assert "pinned and not on this machine: toy:a; --offline opens no connection" in said
        assert side.asked == []
        path.write_text(text)
        assert "pulled" in fresh.forge("fetch", "--offline")
        path.write_text(text.replace('"shared"', f'"{side.url}"'))
        assert "nothing to fetch" in fresh.forge("fetch", "--offline")
        assert side.asked == []
    assert TRAINED not in fresh.forge("build", "--offline")
    assert made.differences(fresh.root) == []


def test_a_remote_that_is_switched_off_is_asked_by_no_command(fresh: Machine) -> None:
    with caching(CacheServer()) as side:
        (fresh.root / "forge.local.toml").write_text(f'[remote]\naddress = "{side.url}"\nmode = "off"\n')
        assert TRAINED in fresh.forge("build")
        for command in ("push", "pull"):
            assert "[remote] is switched off" in fresh.forge(command, code=2)
        fresh.forge("fetch")
        assert side.asked == []


def test_the_project_says_whether_builds_write_there_and_the_command_goes_before_it(fresh: Machine) -> None:
    fresh.empty_remote()
    with (fresh.root / "forge.toml").open("a") as file:
        file.write('mode = "write"\n')  # of [remote], the last table
    for wish in ("--remote=off", "--remote=read", ""):
        shutil.rmtree(fresh.root / "cache", ignore_errors=True)
        assert TRAINED in fresh.forge("build", *filter(None, [wish]))
        assert (fresh.root / "shared/ac").is_dir() == (wish == "")


def test_only_what_the_other_side_lacks_travels(fresh: Machine) -> None:
    """Bytes lie under their digests: of a result whose action alone is gone no byte goes there once more."""
    fresh.forge("build")
    objects = {path.name: path.stat().st_mtime_ns for path in (fresh.root / "shared/cas").glob("*/*")}
    shutil.rmtree(fresh.root / "shared/ac")
    lost = max((fresh.root / "shared/cas").glob("*/*"), key=lambda path: path.stat().st_size)
    lost.unlink()
    fresh.forge("push")
    again = {path.name: path.stat().st_mtime_ns for path in (fresh.root / "shared/cas").glob("*/*")}
    assert {name for name in objects if again[name] != objects[name]} == {lost.name}
    shutil.rmtree(fresh.root / "cache/v1/results")
    (fresh.root / "cache/v1/index.db").unlink()
    lost.unlink()  # the other way: what is here needs not come
    assert "pulled" in fresh.forge("pull")
