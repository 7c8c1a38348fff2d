"""Real object stores as remote caches: SeaweedFS speaks S3, Azurite Azure's protocol.

`pytest -m slow tests/build/test_object_stores.py`, where their programs `weed` and `azurite-blob` are found.
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdforge.remotes.bucket import BucketRemote
from tests.quick import Quick
from tests.remotes.stores import PROGRAMS, ObjectStore, object_store
from tests.survival import Whole

obstore: Any = pytest.importorskip("obstore")
pytestmark = pytest.mark.slow

LARGE = 23 << 20  # bytes, five parts of an upload


@pytest.fixture(scope="module", params=PROGRAMS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    if not shutil.which(PROGRAMS[request.param]):
        pytest.skip(f"there is no {PROGRAMS[request.param]}")
    with object_store(request.param, tmp_path_factory.mktemp("store") / request.param) as found:
        yield found


@pytest.fixture
def address(store: ObjectStore, tmp_path: Path) -> str:
    """A place in the bucket that is this test's alone."""
    return f"{store.address}/{tmp_path.name}"


@pytest.fixture
def one(whole: Whole, address: str, tmp_path: Path) -> Path:
    """The project that has everything."""
    return at(whole.copy(tmp_path / "one"), address)


@pytest.fixture
def two(whole: Whole, address: str, tmp_path: Path) -> Path:
    """Another machine with nothing but git content."""
    root = at(whole.clone(tmp_path / "two"), address)
    shutil.copy(whole.root / "forge.lock", root)
    return root


def at(root: Path, address: str) -> Path:
    with (root / "forge.toml").open("a") as file:
        file.write(f'\n[remote]\naddress = "{address}"\n')
    return root


@pytest.fixture
def remote(store: ObjectStore, address: str, monkeypatch: pytest.MonkeyPatch) -> BucketRemote:
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    return BucketRemote(address)


def trained(root: Path) -> bool:
    return (root / "rehearsal.log").is_file()


def test_another_machine_gets_the_same_bytes(
    store: ObjectStore, one: Path, two: Path, whole: Whole, quick: Quick
) -> None:
    assert "pushed" in quick.forge(one, "push", **store.environment).out
    assert "was there" in quick.forge(one, "push", **store.environment).out
    assert "pulled" in quick.forge(two, "pull", **store.environment).out
    shutil.rmtree(two / "cache")
    assert quick.forge(two, "build", **store.environment).code == 0
    assert not trained(two)
    assert whole.differences(two) == []


def test_what_is_wrong_there_is_put_anew(
    store: ObjectStore, remote: BucketRemote, one: Path, two: Path, whole: Whole, quick: Quick
) -> None:
    quick.forge(one, "push", **store.environment)
    names = [found["path"] for page in obstore.list(remote.store) for found in page]
    for name in names:
        data = bytes(obstore.get(remote.store, name).bytes())
        obstore.put(remote.store, name, data[:-1] + bytes([data[-1] ^ 1]))
    assert "put anew" in quick.forge(one, "push", "--verify", **store.environment).out
    assert quick.forge(two, "build", **store.environment).code == 0
    assert not trained(two)
    assert whole.differences(two) == []


def test_large_files_go_and_come_in_parts(remote: BucketRemote, tmp_path: Path) -> None:
    data = hashlib.shake_256(b"large").digest(LARGE)
    (tmp_path / "large").write_bytes(data)
    name = hashlib.sha256(data).hexdigest()
    remote.put("cas", name, tmp_path / "large")
    assert remote.get("cas", name, tmp_path / "back", LARGE + 1)
    assert (tmp_path / "back").read_bytes() == data


def test_a_key_that_is_not_taken_and_a_bucket_that_is_not_there(store: ObjectStore, one: Path, quick: Quick) -> None:
    ran = quick.forge(one, "push", **store.wrong)
    assert ran.code == 4
    assert "it answers 403" in ran.err
    path = one / "forge.toml"
    path.write_text(path.read_text().replace("//forge/", "//nowhere/"))
    ran = quick.forge(one, "pull", **store.environment)
    assert "was here" in ran.out  # nobody had to be asked
    shutil.rmtree(one / "cache")
    ran = quick.forge(one, "pull", **store.environment)
    assert ran.code == 4
    assert "there is no such bucket" in ran.err


@pytest.mark.parametrize(("number", "words"), [(signal.SIGSTOP, "it does not answer"), (signal.SIGKILL, "refused")])
def test_a_server_that_stops_costs_time_only(
    store: ObjectStore, two: Path, whole: Whole, quick: Quick, number: int, words: str
) -> None:
    """The last one kills the server: what needs it comes before."""
    store.signal(number)
    began = time.monotonic()
    ran = quick.forge(two, "build", "--remote=write", **store.environment)
    store.signal(signal.SIGCONT)
    assert ran.code == 0
    assert words in ran.out
    assert time.monotonic() - began < 60
    assert trained(two)
    assert whole.differences(two) == []
