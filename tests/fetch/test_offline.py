"""`--offline` of `fetch`, `lock` and `add`: what this machine has is found, the rest is named, nobody is asked."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fetch.conftest import Forge
from tests.fetch.server import COMMIT, Host
from tests.fetch.test_fetching import DATA, SHA256, civitai, fetched, source

FOLDER = {"model_index.json": b"{}", "unet/config.json": b"{}\n", "unet/x.safetensors": DATA}


@pytest.fixture
def unplug(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Let no line be opened from now on, by name or by number; one that is tried fails the test."""
    tried: list[Any] = []

    def refuse(*whom: Any, **_: Any) -> None:
        tried.append(whom)
        raise OSError("unplugged")

    def pull() -> None:
        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)

    yield pull
    assert tried == []


def empty_cache(root: Path) -> None:
    shutil.rmtree(root / "cache")


@pytest.mark.parametrize("kind", ["hub", "folder", "civitai", "url"])
def test_what_was_fetched_is_here(root: Path, host: Host, forge: Forge, unplug: Callable[[], None], kind: str) -> None:
    host.repositories["a/b"] = FOLDER | {"x.safetensors": DATA}
    host.files["/x.safetensors"] = DATA
    civitai(host)
    texts = {"hub": "hf://a/b/x.safetensors", "folder": "hf://a/b", "civitai": "civitai.com/models/12"}
    source(root, texts.get(kind, f"{host.url}/x.safetensors"))
    forge("fetch")
    lock = (root / "forge.lock").read_bytes()
    unplug()
    assert "here" in forge("fetch", "--offline").out
    assert (root / "forge.lock").read_bytes() == lock


def test_what_is_pinned_is_found_on_this_machine(
    root: Path, tmp_path: Path, host: Host, forge: Forge, unplug: Callable[[], None]
) -> None:
    civitai(host)
    source(root, "civitai.com/models/12")
    forge("lock")
    unplug()
    said = forge("fetch", "--offline", code=4)
    assert f"m.safetensors (sha256 {SHA256}) is not on this machine" in said.out
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/other.safetensors").write_bytes(DATA[::-1])
    (tmp_path / "mine/called.safetensors").write_bytes(DATA)
    (root / "forge.local.toml").write_text(f'folders = ["{tmp_path / "mine"}"]\n')
    assert "linked" in forge("fetch", "--offline").out
    assert [p.read_bytes() for p in fetched(root)] == [DATA]


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("snapshot", [COMMIT, "e" * 40])
def test_a_declared_file_that_nothing_pins_is_found_in_the_hubs_own_cache(
    root: Path, tmp_path: Path, forge: Forge, unplug: Callable[[], None], snapshot: str
) -> None:
    place = tmp_path / "hub/hub/models--a--b/snapshots" / snapshot / "x.safetensors"
    place.parent.mkdir(parents=True)
    place.write_bytes(DATA)
    source(root, "hf://a/b/x.safetensors", sha256=SHA256)
    unplug()
    assert "linked" in forge("fetch", "--offline").out
    assert not (root / "forge.lock").exists()
    place.unlink()
    assert "is not on this machine" in forge("fetch", "--offline", code=4).out


def test_a_folder_is_put_together_from_the_hubs_own_cache(
    root: Path, tmp_path: Path, host: Host, forge: Forge, unplug: Callable[[], None]
) -> None:
    host.repositories["a/b"] = FOLDER
    source(root, "hf://a/b")
    place = tmp_path / "hub/hub/models--a--b/snapshots" / COMMIT
    for name, data in FOLDER.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    forge("lock")
    known = (root / "forge.lock").read_bytes()
    forge("fetch")
    empty_cache(root)
    unplug()
    assert "linked" in forge("fetch", "--offline").out
    assert {p.read_bytes() for p in fetched(root)} == set(FOLDER.values())
    empty_cache(root)
    (root / "forge.lock").write_bytes(known)  # which has the hashes of large files only
    assert "does not name all files of it" in forge("fetch", "--offline", code=4).out


def test_what_one_cannot_have_is_named_and_does_not_stop_the_others(
    root: Path, host: Host, forge: Forge, unplug: Callable[[], None]
) -> None:
    host.repositories["a/b"] = {"x.safetensors": DATA}
    source(root, "hf://a/b/x.safetensors")
    forge("fetch")
    with (root / "forge.toml").open("a") as file:
        file.write('[source.far]\nfrom = "civitai.com/models/77"\n')
        file.write(f'[source.unknown]\nfrom = "https://example.org/u.safetensors"\nsha256 = "{"0" * 64}"\n')
    unplug()
    said = forge("fetch", "--offline", "--json", code=4)
    events = {row["source"]: row for row in map(json.loads, said.out.splitlines())}
    assert events["it"]["state"] == "here"
    assert "civitai.com/models/77" in events["far"]["message"]
    assert f"u.safetensors (sha256 {'0' * 64})" in events["unknown"]["message"]
    assert {events[name]["code"] for name in ("far", "unknown")} == {4}


def test_a_lock_of_a_stranger_leads_nowhere_else(root: Path, forge: Forge, unplug: Callable[[], None]) -> None:
    source(root, "https://example.org/x.safetensors")
    unplug()
    for files in (f'{{ "../../x" = "{SHA256}" }}', f'{{ "/x" = "{SHA256}" }}', f'{{ "..." = "{SHA256}" }}'):
        row = 'from = "https://example.org/x.safetensors"\nresolved = "https://example.org/x.safetensors"\n'
        (root / "forge.lock").write_text(f"version = 1\n[source.it]\n{row}files = {files}\n")
        assert "is no name that a file can have" in forge("fetch", "--offline", code=2).out


def test_lock_and_add_ask_nobody(root: Path, forge: Forge, unplug: Callable[[], None]) -> None:
    unplug()
    forge("lock", "--offline", "--update")
    source(root, "hf://a/b/x.safetensors")
    forge("lock", "--offline")
    assert "what it is now has to be asked for" in forge("lock", "--offline", "--update", code=4).err
    forge("add", "more", "hf://a/b/y.safetensors", "--offline")
    assert "what hf://a/b/x.safetensors stands for is not pinned" in forge("fetch", "it", "--offline", code=4).out
