"""Two machines and a cache between them: what is pinned travels, what is planted does not, faults cost time only."""

from __future__ import annotations

import json
import re
import select
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sdforge.errors import BrokenPromise
from sdforge.exchange import fetching, verify_signature
from sdforge.remotes import open_remote
from sdforge.session import open_session
from sdforge.sharing import Sharing, pinned_results
from sdforge.store import Store
from tests.conftest import Project, new_project
from tests.remotes.plants import PLANTS, actions, plant
from tests.remotes.server import CacheServer, caching
from tests.signing.test_signatures import new_key
from tests.survival import flip

pytestmark = pytest.mark.usefixtures("forked")

RECIPE = """\
family = "sd15"

[rehearsal.a]
on = "base"
dataset = "drawings"

[rehearsal.b]
on = "a"
dataset = "drawings"
rank = 6

[preset]
checkpoint = "b"
"""


@dataclass
class Made:
    """A project that has trained, and what it put into a cache."""

    project: Project
    held: dict[str, bytes]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Path) -> Made:
    found = new_project(tmp_path_factory.mktemp("sharing") / "one", toy_checkpoint, RECIPE)
    with caching(CacheServer()) as side:
        with (found.root / "forge.toml").open("a") as file:
            file.write(f'\n[remote]\naddress = "{side.url}"\n')
        found.build("--remote=write")
        assert found.starts() == ["a", "b"]
        return Made(found, dict(side.held))


@pytest.fixture
def side(made: Made) -> Iterator[CacheServer]:
    """A cache that holds what was put there."""
    with caching(CacheServer(held=dict(made.held))) as found:
        yield found


@pytest.fixture
def one(made: Made, side: CacheServer, tmp_path: Path) -> Project:
    """The project that has everything."""
    shutil.copytree(made.project.root, tmp_path / "one")
    return at(Project(tmp_path / "one"), side)


@pytest.fixture
def two(made: Made, side: CacheServer, tmp_path: Path) -> Project:
    """Another machine with nothing but git content."""
    return at(made.project.clone(tmp_path / "two"), side)


def at(project: Project, side: CacheServer) -> Project:
    path = project.root / "forge.toml"
    path.write_text(re.sub(r'address = ".*"', f'address = "{side.url}"', path.read_text()))
    return project


def pinned(project: Project) -> list[str]:
    return sorted(line for line in project.lock.splitlines() if line.startswith("[result."))


def test_another_machine_trains_nothing_and_gets_the_same_bytes(two: Project, made: Made) -> None:
    plan = json.loads(two.forge("plan", "--json").out.splitlines()[-1])
    states = {a["target"].partition(":")[2]: a["state"] for a in plan["actions"]}
    assert (states["b"], states["preset.export"]) == ("fetch", "build")
    ran = two.build()
    assert [e["target"] for e in ran.of("action") if e["state"] == "fetched"] == ["toy:b"]  # nobody reads a
    assert (ran.built, two.starts()) == (["preset.export"], [])
    assert two.output.read_bytes() == made.project.output.read_bytes()
    assert two.lock == made.project.lock


def test_with_everything_at_hand_no_remote_is_asked(one: Project, side: CacheServer) -> None:
    assert one.build().built == []
    assert side.asked == []


def test_off_and_read_put_nothing_there(two: Project, made: Made, side: CacheServer) -> None:
    two.edit("rank = 6", "rank = 9")
    two.build("--remote=off", "a")
    assert side.asked == []
    two.build()
    assert side.held == made.held


def test_an_empty_remote_is_a_miss_and_the_plan_says_so(two: Project, made: Made, side: CacheServer) -> None:
    side.held.clear()
    assert "the pinned result is not to be had" in two.forge("plan").out
    two.build()
    assert two.starts() == ["a", "b"]
    assert two.output.read_bytes() == made.project.output.read_bytes()


@pytest.mark.parametrize("fault", ["403", "500", "cut", "wrong", "gone"])
def test_a_fault_costs_time_and_never_bytes(two: Project, made: Made, side: CacheServer, fault: str) -> None:
    side.fault = fault
    ran = two.build()
    assert two.starts() == ["a", "b"]
    assert ran.of("note")
    assert two.output.read_bytes() == made.project.output.read_bytes()
    assert two.lock == made.project.lock


def test_locked_fetches_or_refuses(two: Project, made: Made, side: CacheServer) -> None:
    assert two.build("--locked").built == ["preset.export"]
    side.fault = "wrong"
    three = at(made.project.clone(two.root.with_name("three")), side)
    ran = three.forge("build", "--locked", code=3)
    assert "is not to be had" in ran.out + ran.err
    assert three.starts() == []


def test_a_result_that_differs_from_its_pin_gives_way_to_the_pinned_one(two: Project, made: Made) -> None:
    (two.root / "forge.local.toml").write_text("[run]\nthreads = 2\n")  # on which rehearsals come out differently
    two.build("--remote=off")
    assert two.output.read_bytes() != made.project.output.read_bytes()
    two.forge("pull")
    assert two.build().built == ["preset.export"]
    assert two.output.read_bytes() == made.project.output.read_bytes()


def test_a_damaged_pinned_result_is_fetched_again(two: Project) -> None:
    two.build()
    before = two.output.read_bytes()
    records = [json.loads(p.read_bytes()) for p in (two.root / "cache" / "v1" / "results").rglob("*.json")]
    (pack,) = next(record["packs"] for record in records if record["record"].get("target") == "toy:b")
    path = two.root / "cache" / "v1" / "objects" / pack[:2] / pack
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    two.output.unlink()
    ran = two.build()
    assert two.starts() == []
    assert [e for e in ran.of("action") if e["state"] == "fetched"]
    assert two.output.read_bytes() == before


def test_a_damaged_object_that_nothing_needs_is_set_aside_when_it_is_pulled_for(two: Project) -> None:
    """Its result is not known here any more, so no build has noticed."""
    two.forge("pull")
    cache = two.root / "cache/v1"
    for path in cache.glob("objects/*/*"):
        flip(path, path)
    for path in (cache / "results", cache / "index.db"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert two.forge("pull").out.count("pulled") == 2
    assert any((cache / "quarantine").iterdir())


def test_what_comes_beside_a_build_leaves_the_index_to_its_thread(two: Project, side: CacheServer) -> None:
    """SQLite refuses another one; where the build had only read in it, what had come was thrown away."""
    two.forge("plan")
    session = open_session(two.root)
    session.read_lock()
    pin = next(pinned_results(session.lock.results))
    store = Store(two.root / "cache")
    handle, events = fetching(Sharing(store, open_remote(side.url, two.root)), pin), []
    while not events or events[-1]["event"] == "progress":
        select.select([handle], [], [])
        events += handle.poll()
    assert events[-1]["event"] == "fetched", events
    store.keep(events[-1]["result"], events[-1]["manifest"])
    assert [row[0] for row in store.index.read("known")] == [pin.key]


@pytest.mark.parametrize("change", PLANTS)
def test_a_planted_action_is_not_believed(two: Project, made: Made, side: CacheServer, change: Any) -> None:
    plant(side, change)
    (two.root / "precious.txt").write_text("mine")
    two.build()
    assert two.starts() == ["a", "b"]
    assert (two.root / "precious.txt").read_text() == "mine"
    assert two.output.read_bytes() == made.project.output.read_bytes()
    assert two.lock == made.project.lock


def test_push_and_pull_say_what_travelled(one: Project, two: Project, made: Made, side: CacheServer) -> None:
    side.held.clear()
    assert one.forge("push", "toy:a").out.count("pushed") == 1
    rows = [json.loads(line) for line in one.forge("push", "--json").out.splitlines()]
    assert sorted(row["state"] for row in rows) == ["pushed", "was there"]
    assert side.held == made.held  # a build put the same there, what is known of losses too
    assert two.forge("pull").out.count("pulled") == 2
    assert two.forge("pull").out.count("was here") == 2
    del side.held[sorted(actions(side))[0]]
    three = at(made.project.clone(two.root.with_name("three")), side)
    assert "not to be had" in three.forge("pull", code=3).out


def test_without_a_remote_the_commands_say_how_to_name_one(project: Project) -> None:
    assert "[remote] address" in project.forge("push", code=2).err


def test_no_place_of_this_machine_travels(made: Made) -> None:
    assert not any(str(made.project.root).encode() in data for data in made.held.values())


# -- what a trusted key signed -----------------------------------------------------------------------------------------


@pytest.fixture
def key(tmp_path: Path) -> tuple[Path, str]:
    """A private key's file, and the line of its public key."""
    return tmp_path / "key", new_key(tmp_path / "key")


def trust(project: Project, public: str) -> None:
    with (project.root / "forge.toml").open("a") as file:
        file.write(f'\n[trust]\nkeys = ["{public} us"]\n')


def test_what_a_trusted_key_signed_is_had_without_a_pin(
    one: Project, two: Project, made: Made, key: tuple[Path, str]
) -> None:
    one.forge("push", "--key", str(key[0]))
    trust(two, key[1])
    (two.root / "forge.lock").unlink()
    ran = two.build()
    assert [e["target"] for e in ran.of("action") if e["state"] == "fetched"] == ["toy:b"]
    assert two.starts() == []
    assert pinned(two) == pinned(made.project)
    assert two.output.read_bytes() == made.project.output.read_bytes()


def test_what_a_stranger_signed_is_not(
    one: Project, two: Project, made: Made, key: tuple[Path, str], tmp_path: Path
) -> None:
    one.forge("push", "--key", str(key[0]))
    trust(two, new_key(tmp_path / "another"))
    (two.root / "forge.lock").unlink()
    two.build()
    assert two.starts() == ["a", "b"]
    assert pinned(two) == pinned(made.project)


def test_the_lock_is_signed_and_a_change_is_seen(one: Project, key: tuple[Path, str]) -> None:
    one.forge("sign", "--key", str(key[0]))
    trust(one, key[1])
    session = open_session(one.root)
    assert verify_signature(session) == f"{key[1]} us"
    assert "us" in one.forge("verify", "--signed").out
    (one.root / "forge.lock").write_text(one.lock.replace("rank = 6", "rank = 7"))
    assert "the signature is of something else" in one.forge("verify", "--signed", code=3).err
    with pytest.raises(BrokenPromise, match=r"forge\.lock\.sig: the signature is of something else"):
        verify_signature(session)
    (one.root / "forge.lock.sig").unlink()
    with pytest.raises(BrokenPromise, match="is not signed"):
        verify_signature(session)
