"""Files that the Hub keeps with Xet come over its bridge, which plain HTTP crosses with a ticket for a single try."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.fetch.conftest import Forge
from tests.fetch.server import COMMIT, Handler, Host, serving

DATA = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(DATA).hexdigest()
FILE = "weights of one.safetensors"


@dataclass
class Bridge(Host):
    """Where the bytes lie. used: tickets that were shown and let nobody across any more."""

    used: list[str] = field(default_factory=list)


class _Bridge(Handler):
    host: Bridge

    def do_GET(self) -> None:  # noqa: N802 -- as the library calls it
        ticket = urlsplit(self.path).query
        self.host.asked.append((self.path, self.headers.get("Range", ""), self.headers.get("Authorization", "")))
        if not ticket or ticket in self.host.used:
            return self.send(403, b"<Error>AccessDenied</Error>", "application/xml")
        self.host.used.append(ticket)
        return self.file(DATA)


@dataclass
class XetHub(Host):
    """bridge: the address where its files lead."""

    bridge: str = ""
    tickets: int = 0


class _XetHub(Handler):
    host: XetHub

    def do_GET(self) -> None:  # noqa: N802 -- as the library calls it
        path = unquote(urlsplit(self.path).path)
        if self.host.answer(path)[0] != "file":
            return super().do_GET()
        self.host.asked.append((path, self.headers.get("Range", ""), self.headers.get("Authorization", "")))
        self.host.tickets += 1
        ticket = f"X-Amz-Expires=3600&X-Amz-Signature=c0ffee{self.host.tickets}"
        return self.lead(f"{self.host.bridge}/xet-bridge-us/1/{SHA256[:16]}?{ticket}", DATA)


@pytest.fixture
def bridge() -> Iterator[Bridge]:
    with serving(Bridge(), _Bridge) as found:
        assert isinstance(found, Bridge)
        yield found


@pytest.fixture
def xet(root: Path, bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> Iterator[XetHub]:
    (root / "forge.toml").write_text(f'[source.it]\nfrom = "hf://a/b/{FILE}"\n')
    side = XetHub(repositories={"a/b": {FILE: DATA}}, bridge=bridge.url)
    with serving(side, _XetHub) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        assert isinstance(found, XetHub)
        yield found


def came(root: Path) -> list[bytes]:
    return [p.read_bytes() for p in (root / "cache" / "v1" / "fetched").rglob("*.safetensors")]


def test_a_file_comes_over_the_bridge_and_is_pinned_by_its_sha256(
    root: Path, xet: XetHub, bridge: Bridge, forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    said = forge("fetch")
    assert came(root) == [DATA]
    lock = (root / "forge.lock").read_text()
    assert f'"{FILE}" = "{SHA256}"' in lock
    assert f"hf://a/b@{COMMIT}/{FILE}" in lock
    assert {token for path, _, token in xet.asked if "resolve" in path} == {"Bearer hf_secret"}
    assert {token for _, _, token in bridge.asked} == {""}
    assert "c0ffee" not in lock + said.out + said.err  # a ticket is a secret


def test_a_line_that_breaks_gets_a_new_ticket_and_goes_on(
    root: Path, xet: XetHub, bridge: Bridge, forge: Forge
) -> None:
    bridge.faults = ["cut", "503", ""]
    forge("fetch")
    assert came(root) == [DATA]
    half = f"bytes={len(DATA) // 2}-"
    assert [asked for _, asked, _ in bridge.asked] == ["", half, half]
    assert xet.tickets == 3


@pytest.mark.usefixtures("xet")
def test_other_bytes_from_the_bridge_are_refused(root: Path, bridge: Bridge, forge: Forge) -> None:
    bridge.faults = ["wrong"]
    said = forge("fetch", code=3)
    assert "another file than was promised" in said.out
    assert came(root) == []


@pytest.mark.usefixtures("xet")
def test_a_bridge_that_lets_nobody_across_is_named_without_the_ticket(bridge: Bridge, forge: Forge) -> None:
    bridge.used = ["X-Amz-Expires=3600&X-Amz-Signature=c0ffee1"]
    said = forge("fetch", code=4)
    assert "(403)" in said.out
    assert "c0ffee" not in said.out + said.err
