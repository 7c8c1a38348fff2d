"""What lies on a remote cache and is wrong is written anew by whoever has the result, if the server lets them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdforge.remotes.action_result import decode
from sdforge.sharing import statement_name
from tests.conftest import Ran
from tests.quick import Quick
from tests.remotes.server import KEPT, CacheServer, as_bucket, caching
from tests.signing.test_signatures import new_key
from tests.survival import Whole, flip

KINDS = ("folder", "http", "s3")


@dataclass
class Shared:
    """A project that has its result, and what lies of it on its remote cache."""

    root: Path
    quick: Quick
    environment: dict[str, str]
    side: CacheServer | None = None  # None: a folder

    def forge(self, *arguments: str, code: int = 0, root: Path | None = None) -> Ran:
        ran = self.quick.forge(root or self.root, *arguments, **self.environment)
        assert ran.code == code, ran.out + ran.err
        assert "Traceback" not in ran.out + ran.err
        return ran

    def names(self) -> list[str]:
        """Name what lies there, as `cas/…` and `ac/…`."""
        if self.side:
            return sorted(path.removeprefix("/") for path in self.side.held)
        return sorted(f"{path.relative_to(self.folder).parts[0]}/{path.name}" for path in self._files())

    def read(self, name: str) -> bytes:
        return self.side.held[f"/{name}"] if self.side else self._path(name).read_bytes()

    def spoil(self, name: str) -> None:
        """Turn a bit of what lies under a name."""
        if self.side:
            data = self.side.held[f"/{name}"]
            self.side.held[f"/{name}"] = bytes([data[0] ^ 1]) + data[1:]
        else:
            flip(self._path(name), self._path(name))

    def copy(self, name: str, other: str) -> None:
        """Let what lies under a name lie under another one too."""
        if self.side:
            self.side.held[f"/{other}"] = self.side.held[f"/{name}"]
        else:
            space, _, sha256 = other.partition("/")
            (self.folder / space / sha256[:2]).mkdir(exist_ok=True)
            shutil.copy(self._path(name), self.folder / space / sha256[:2] / sha256)

    def drop(self, name: str) -> None:
        if self.side:
            del self.side.held[f"/{name}"]
        else:
            self._path(name).unlink()

    @property
    def folder(self) -> Path:
        return self.root / "shared"

    def _files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def _path(self, name: str) -> Path:
        return next(path for path in self._files() if path.name == name.rpartition("/")[2])


def address_at(root: Path, address: str) -> None:
    with (root / "forge.toml").open("a") as file:
        file.write(f'\n[remote]\naddress = "{address}"\n')


@pytest.fixture(params=KINDS)
def shared(request: pytest.FixtureRequest, whole: Whole, quick: Quick, tmp_path: Path) -> Iterator[Shared]:
    root = whole.copy(tmp_path / "one")
    if request.param == "folder":
        address_at(root, str(root / "shared"))
        found = Shared(root, quick, {})
        found.forge("push")
        yield found
        return
    if request.param != "http":
        pytest.importorskip("obstore")
    with caching(CacheServer()) as side:
        address_at(root, side.url if request.param == "http" else f"{request.param}://cache")
        found = Shared(root, quick, as_bucket(request.param, side, tmp_path), side)
        found.forge("push")
        yield found


@pytest.fixture
def fresh(shared: Shared, whole: Whole, tmp_path: Path) -> Path:
    """Another machine with git content only."""
    root = whole.clone(tmp_path / "two")
    for name in ("forge.toml", "forge.lock"):
        shutil.copy(shared.root / name, root)
    return root


@pytest.mark.parametrize("shared", [*KINDS, "gs"], indirect=True)
def test_what_is_wrong_is_read_back_and_put_anew(shared: Shared, fresh: Path) -> None:
    before = {name: shared.read(name) for name in shared.names()}
    for name in before:
        if name.startswith("cas/"):
            shared.spoil(name)
    assert "was there" in shared.forge("push").out  # names alone tell nothing
    assert "put anew" in shared.forge("push", "--verify").out
    assert {name: shared.read(name) for name in shared.names()} == before
    assert "is as it was pushed" in shared.forge("push", "--verify").out
    assert "pulled" in shared.forge("pull", root=fresh).out


def test_each_file_by_itself_is_noticed(shared: Shared) -> None:
    before = {name: shared.read(name) for name in shared.names()}
    assert len(before) == 6  # action, description, manifest, table, pack, losses
    for name in before:
        shared.spoil(name)
        assert "put anew" in shared.forge("push", "--verify").out
        assert {each: shared.read(each) for each in shared.names()} == before


def test_what_is_sound_is_only_read(shared: Shared) -> None:
    if shared.side:
        shared.side.asked.clear()
    said = shared.forge("push", "--verify", "--json").out
    (row,) = map(json.loads, said.splitlines())
    assert (row["state"], row["bytes"]) == ("is as it was pushed", 0)
    assert shared.side is None or {verb for verb, _ in shared.side.asked} == {"GET"}


def test_what_a_server_has_thrown_away_is_put_there_again_without_a_wish(shared: Shared) -> None:
    before = shared.names()
    for name in before:
        shared.drop(name)
        assert "pushed" in shared.forge("push").out
        assert shared.names() == before


def test_a_build_that_found_wrong_bytes_puts_what_it_trained_in_their_place(
    shared: Shared, fresh: Path, whole: Whole
) -> None:
    before = {name: shared.read(name) for name in shared.names()}
    files = decode(shared.read(next(name for name in before if name.startswith("ac/"))))
    pack = max((file for file in files if file.path.startswith("objects/")), key=lambda file: file.size)
    shared.spoil(f"cas/{pack.sha256}")
    ran = shared.forge("build", "--remote=write", root=fresh)
    assert f"holds other bytes under {pack.sha256[:12]}; `forge push --verify` where the result is" in ran.out
    assert (fresh / "rehearsal.log").is_file()
    assert whole.differences(fresh) == []
    assert shared.read(f"cas/{pack.sha256}") == before[f"cas/{pack.sha256}"]


def test_a_server_that_keeps_what_it_has_is_told_of(quick: Quick, whole: Whole, tmp_path: Path) -> None:
    root = whole.copy(tmp_path / "one")
    with caching(CacheServer()) as side:
        address_at(root, side.url)
        found = Shared(root, quick, {}, side)
        found.forge("push")
        name = next(name for name in found.names() if name.startswith("cas/"))
        found.spoil(name)
        side.fault = KEPT
        ran = found.forge("push", "--verify", code=3)
    assert f"does not let {name} be written anew" in ran.err
    assert "has to delete" in ran.err


# -- statements --------------------------------------------------------------------------------------------------------


@pytest.fixture
def key(shared: Shared, tmp_path: Path) -> Path:
    """A private key that the project trusts, with which its result is signed."""
    pytest.importorskip("cryptography")
    public = new_key(tmp_path / "key")
    with (shared.root / "forge.toml").open("a") as file:
        file.write(f'\n[trust]\nkeys = ["{public} us"]\n')
    shared.forge("push", "--key", str(tmp_path / "key"))
    return tmp_path / "key"


def content_key(root: Path) -> str:
    """Return what the lock pins a result for."""
    lock = (root / "forge.lock").read_text()
    (found,) = {line.split(".")[1] for line in lock.splitlines() if line.startswith("[result.")}
    return found


def statement(shared: Shared) -> list[str]:
    """Name what lies there of the statement: the action, the text and its signature."""
    action = f"ac/{statement_name(content_key(shared.root))}"
    return [action, *(f"cas/{file.sha256}" for file in decode(shared.read(action)))]


def test_a_damaged_statement_is_told_of_and_signed_anew(shared: Shared, key: Path) -> None:
    before = {name: shared.read(name) for name in shared.names()}
    for name in statement(shared):
        shared.spoil(name)
        ran = shared.forge("push", "--verify", code=3)
        assert "is not believed" in ran.err
        assert "`forge push --key FILE` signs it anew" in ran.err
        shared.forge("push", "--verify", "--key", str(key))
        assert {each: shared.read(each) for each in shared.names()} == before
    shared.forge("push", "--verify")


def test_a_build_says_that_a_statement_is_not_believed(shared: Shared, key: Path, fresh: Path, whole: Whole) -> None:
    assert key.is_file()
    shutil.copy(shared.root / "forge.toml", fresh)
    (fresh / "forge.lock").unlink()
    shared.spoil(statement(shared)[-1])
    for command in ("plan", "build"):
        assert shared.forge(command, root=fresh).out.count("is not believed: the remote cache holds other bytes") == 1
    assert whole.differences(fresh) == []


def test_a_statement_is_believed_for_its_own_key_only_and_never_under_locked(
    shared: Shared, key: Path, fresh: Path, tmp_path: Path
) -> None:
    assert key.is_file()
    shutil.copy(shared.root / "forge.toml", fresh)
    (fresh / "forge.lock").unlink()
    shared.forge("build", "--locked", root=fresh, code=3)
    other = tmp_path / "other"
    shutil.copytree(fresh, other)
    for root in (fresh, other):
        recipe = root / "recipes" / "toy.toml"
        recipe.write_text(recipe.read_text().replace("steps = 6", "steps = 7"))
    shared.forge("build", "--remote=off", root=other)
    shared.copy(statement(shared)[0], f"ac/{statement_name(content_key(other))}")
    assert "it is about another key" in shared.forge("build", root=fresh).out
    assert "step toy:a 6" in (fresh / "rehearsal.log").read_text()
