"""Kinds of remote caches: each keeps bytes under names, and says in one sentence when it cannot."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sdforge.remotes.http as http
from sdforge.errors import ResourceError, UsageError
from sdforge.lines import Patience
from sdforge.remotes import Remote, open_remote
from sdforge.remotes.action_result import File, decode, encode
from sdforge.remotes.http import TOKEN
from tests.remotes.server import CacheServer, caching

DATA = b"some bytes" * 1000
NAME = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(params=["folder", "http", "bucket"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Remote]:
    if request.param == "folder":
        yield open_remote("shared", tmp_path)
    elif request.param == "bucket":
        pytest.importorskip("obstore")
        yield open_remote((tmp_path / "bucket").as_uri(), tmp_path)
    else:
        with caching(CacheServer()) as side:
            yield open_remote(side.url, tmp_path)


def test_what_was_put_is_there_and_nothing_else(remote: Remote, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(DATA)
    assert not remote.has("cas", NAME)
    assert not remote.get("cas", NAME, tmp_path / "back", len(DATA))
    remote.put("cas", NAME, tmp_path / "data")
    assert remote.has("cas", NAME)
    assert not remote.has("ac", NAME)
    assert remote.get("cas", NAME, tmp_path / "back", len(DATA))
    assert (tmp_path / "back").read_bytes() == DATA


def test_no_more_is_taken_than_was_asked_for(remote: Remote, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(DATA)
    remote.put("cas", NAME, tmp_path / "data")
    assert remote.get("cas", NAME, tmp_path / "back", 10)
    assert (tmp_path / "back").read_bytes() == DATA[:10]


@pytest.mark.parametrize("fault", ["403", "500", "cut", "drip"])
def test_a_server_that_misbehaves_is_named_in_one_sentence_and_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(http, "PATIENCE", Patience(silent=0.5, seconds=0.2, slowest=10_000))
    with caching(CacheServer(held={f"/cas/{NAME}": DATA}, fault=fault)) as side:
        began = time.monotonic()
        with pytest.raises(ResourceError, match=r"the remote cache at 127\.0\.0\.1 does not serve") as said:
            open_remote(side.url, tmp_path).get("cas", NAME, tmp_path / "back", len(DATA))
        assert time.monotonic() - began < 5
    assert "--remote=off" in said.value.hint


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with caching(CacheServer()) as side:
        pass
    with pytest.raises(ResourceError, match="does not serve"):
        open_remote(side.url, tmp_path).has("cas", NAME)


def test_a_token_is_sent_and_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with caching(CacheServer(held={f"/cas/{NAME}": DATA}, token="t0ken")) as side:
        with pytest.raises(ResourceError, match=f"{TOKEN} is not set"):
            open_remote(side.url, tmp_path).has("cas", NAME)
        monkeypatch.setenv(TOKEN, "t0ken")
        assert open_remote(side.url, tmp_path).has("cas", NAME)
        monkeypatch.setenv(TOKEN, "other")
        with pytest.raises(ResourceError, match="is not taken") as said:
            open_remote(side.url, tmp_path).has("cas", NAME)
    assert "other" not in said.value.message + said.value.hint


def test_a_name_and_a_password_are_sent_as_servers_ask_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # RFC 7617's own example
    monkeypatch.setenv(TOKEN, "Aladdin:open sesame")
    remote = open_remote("http://127.0.0.1:1/cache", tmp_path)
    assert isinstance(remote, http.HttpRemote)
    assert remote.headers == {"Authorization": "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="}


@pytest.mark.parametrize(
    "address",
    ["ftp://x/y", "https://user:secret@x/y", "https://x/y?token=secret", "https://x:y/", "https://", "../up", "s4://b"],
)
def test_what_is_no_remote_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(UsageError) as said:
        open_remote(address, tmp_path)
    assert "secret" not in said.value.message + said.value.hint


def test_a_token_that_cannot_be_sent_is_refused_without_being_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN, "t0k\x01en")
    with pytest.raises(UsageError, match=TOKEN) as said:
        open_remote("http://127.0.0.1:1/cache", tmp_path)
    assert "t0k" not in said.value.message + said.value.hint


HEX = st.text("0123456789abcdef", min_size=64, max_size=64)


@given(st.lists(st.builds(File, st.text(min_size=1, max_size=20), HEX, st.integers(0, 2**50)), max_size=5))
def test_an_action_names_its_files(files: list[File]) -> None:
    assert decode(encode(files)) == files


def test_an_action_is_laid_out_as_the_protocol_has_it() -> None:
    # ActionResult {output_files: [OutputFile {path: "a", digest: Digest {hash: "bc", size_bytes: 300}}]} by protoc
    assert encode([File("a", "bc", 300)]) == bytes.fromhex("120c0a01611207" + "0a026263" + "10ac02")


@given(st.binary(max_size=60))
def test_any_bytes_are_an_action_or_none(data: bytes) -> None:
    try:
        decode(data)
    except ValueError:
        return
