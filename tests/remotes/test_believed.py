"""What of a remote's action is believed: only what the pin vouches for, down to the bytes of every tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdforge.errors import ResourceError
from sdforge.identity import canonical, digest_of_text
from sdforge.lock import Pin, pin_of
from sdforge.remotes.action_result import decode, encode
from sdforge.remotes.folder import FolderRemote
from sdforge.sharing import MANIFEST, OBJECT, RESULT, Poisoned, Sharing, action_name
from sdforge.store import Store, files
from sdforge.store.entries import sum_of
from tests.store.conftest import digest_of, make_result

METHOD: dict[str, Any] = {"method": "x", "version": 1, "settings": {}, "inputs": {}}
KEY = digest_of_text("action", canonical(METHOD))
OTHER = b"other text"  # as long as the tensor's own bytes


class Shared:
    """A folder with one result, and what its action names: path → bytes."""

    def __init__(self, folder: Path) -> None:
        store = Store(folder / "one")
        store.note_preimage(KEY, canonical(METHOD))
        result = make_result(store, KEY, b"some bytes")
        self.pin: Pin = pin_of(result, [KEY], METHOD)
        self.folder, self.remote = folder / "shared", FolderRemote(folder / "shared")
        Sharing(store, self.remote, writes=True).push(result, lambda *_: None)
        self.two = Store(folder / "two")

    def _place(self, space: str, name: str) -> Path:
        return self.folder / space / name[:2] / name

    def put(self, data: bytes) -> str:
        name, place = digest_of(data), self._place("cas", digest_of(data))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        return name

    def files(self) -> dict[str, Any]:
        data = self._place("ac", action_name(KEY, self.pin.digest)).read_bytes()
        return {file.path: file for file in decode(data)}

    def read(self, path: str) -> bytes:
        return self._place("cas", self.files()[path].sha256).read_bytes()

    def plant(self, path: str, data: bytes, also: str = "") -> str:
        """Let the action name other bytes under a path; also: a path for them besides."""
        files, name = self.files(), self.put(data)
        files[path] = next(iter(files.values()))._replace(path=path, sha256=name, size=len(data))
        place = self._place("ac", action_name(KEY, self.pin.digest))
        place.chmod(0o644)
        place.write_bytes(encode(sorted(files.values())))
        return self.plant(also + name, data) if also else name

    def describe(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the description, and its sum with it."""
        value = json.loads(self.read(RESULT))
        del value["sum"]
        change(value)
        self.plant(RESULT, json.dumps(value | {"sum": sum_of(value)}).encode())

    def list_anew(self, change: Callable[[list[Any]], None]) -> None:
        """Change the row of the only tensor in the only table."""
        (path,) = (OBJECT + row[2] for row in json.loads(self.read(RESULT))["components"].values())
        rows = json.loads(self.read(path))
        change(rows[0])
        table = self.plant("unused", json.dumps(rows).encode(), OBJECT)

        def name(value: dict[str, Any]) -> None:
            for component in value["components"].values():
                component[2] = table

        self.describe(name)

    def pull(self) -> Any:
        return Sharing(self.two, self.remote).pull(self.pin, lambda *_: None)


@pytest.fixture
def shared(tmp_path: Path) -> Shared:
    return Shared(tmp_path)


def test_what_the_pin_vouches_for_comes(shared: Shared) -> None:
    assert shared.pull().digest == shared.pin.digest
    assert shared.two.preimage(KEY) == METHOD


def test_an_action_is_put_after_all_that_it_names(shared: Shared) -> None:
    class Watched(FolderRemote):
        def put(self, space: str, name: str, path: Path) -> None:
            spaces.append(space)
            super().put(space, name, path)

    spaces: list[str] = []
    shared.pull()
    (result,) = shared.two.known(KEY).results
    Sharing(shared.two, Watched(shared.folder.with_name("third")), writes=True).push(result, lambda *_: None)
    assert spaces == ["cas"] * (len(shared.files())) + ["ac"]


def test_what_a_folder_is_given_is_there_whole_or_not_at_all(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_published", 0)
    monkeypatch.setenv(files.FAULT, "EIO:1")
    (tmp_path / "x").write_bytes(OTHER)
    with pytest.raises(ResourceError):
        shared.remote.put("cas", digest_of(OTHER), tmp_path / "x")
    assert not shared.remote.has("cas", digest_of(OTHER))
    assert list((shared.folder / "tmp").iterdir()) == []


def another_manifest(shared: Shared) -> None:
    shared.plant(MANIFEST, canonical(METHOD | {"version": 2}).encode())


def other_facts(shared: Shared) -> None:
    shared.describe(lambda value: value["facts"].update(alpha=2.0))


def other_contents(shared: Shared) -> None:
    def change(value: dict[str, Any]) -> None:
        value["components"]["lora"][0] = value["components"]["lora"][1] = "0" * 64

    shared.describe(change)


def a_way_out(shared: Shared) -> None:
    shared.describe(lambda value: value.update(packs=["../../../etc/passwd"]))


def another_shape(shared: Shared) -> None:
    shared.list_anew(lambda row: row.__setitem__(2, [5, 2]))


def no_place(shared: Shared) -> None:
    shared.list_anew(lambda row: row.__setitem__(6, None))


def before_the_file(shared: Shared) -> None:
    shared.list_anew(lambda row: row.__setitem__(6, [row[6][0], -1]))


def behind_its_end(shared: Shared) -> None:
    shared.list_anew(lambda row: row.__setitem__(6, [row[6][0], 4]))


def in_another_file(shared: Shared) -> None:
    other = shared.plant("unused", OTHER, OBJECT)
    shared.list_anew(lambda row: row.__setitem__(6, [other, 0]))


def in_another_pack(shared: Shared) -> None:
    in_another_file(shared)
    shared.describe(lambda value: value.update(packs=[digest_of(OTHER)]))


def other_bytes_under_its_name(shared: Shared) -> None:
    (pack,) = json.loads(shared.read(RESULT))["packs"]
    place = shared._place("cas", pack)
    place.chmod(0o644)
    place.write_bytes(OTHER)


PLANTS = {
    another_manifest: "the manifest of",
    other_facts: "another result",
    other_contents: "another result",
    a_way_out: "calls an object",
    another_shape: "other tensors",
    no_place: "does not say where",
    before_the_file: "does not say where",
    behind_its_end: "other bytes for",
    in_another_file: "does not say where",
    in_another_pack: "other bytes for",
    other_bytes_under_its_name: "other bytes under",
}


@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_planted_is_named_and_not_kept(shared: Shared, plant: Callable[[Shared], None]) -> None:
    plant(shared)
    with pytest.raises(Poisoned, match=PLANTS[plant]):
        shared.pull()
    assert Store(shared.two.root.parent).known(KEY).results == []
