"""Kinds of remote caches: each keeps bytes under names, and says in one sentence when it cannot."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sdforge.remotes.bucket as bucket
import sdforge.remotes.http as http
from sdforge.errors import ResourceError, UsageError
from sdforge.lines import Patience, open_line
from sdforge.remotes import Remote, open_remote
from sdforge.remotes.action_result import File, decode, encode
from sdforge.remotes.http import TOKEN
from tests.remotes.server import DRIPPING, SLOW, CacheServer, as_bucket, caching

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


@pytest.mark.parametrize("fault", ["403", "500", "cut", "drip", "hang", DRIPPING])
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


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_what_is_large_goes_in_parts_to_a_bucket(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    data = bytes(range(251)) * (13 << 12)  # 13 MB
    name = hashlib.sha256(data).hexdigest()
    (tmp_path / "data").write_bytes(data)
    with caching(CacheServer()) as side:
        for variable, value in as_bucket(scheme, side, tmp_path).items():
            monkeypatch.setenv(variable, value)
        place = open_remote(f"{scheme}://cache", tmp_path)
        assert not place.has("cas", name)
        place.put("cas", name, tmp_path / "data")
        assert (side.held, side.parts) == ({f"/cas/{name}": data}, {})
        assert [verb for verb, _ in side.asked].count("PUT") == 3
        assert place.get("cas", name, tmp_path / "back", len(data))
    assert (tmp_path / "back").read_bytes() == data


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[CacheServer]:
    """A server that answers as S3 does, and keys for it."""
    pytest.importorskip("obstore")
    monkeypatch.setattr(bucket, "PATIENCE", Patience(silent=0.5, seconds=0.2, slowest=10_000))
    monkeypatch.setattr(bucket, "SILENT_PUT", 0.5)
    monkeypatch.setattr(bucket, "TRYING", 0.5)
    for name, value in (("ACCESS_KEY_ID", "k3y"), ("SECRET_ACCESS_KEY", "s3cret"), ("ALLOW_HTTP", "true")):
        monkeypatch.setenv(f"AWS_{name}", value)
    with caching(CacheServer(held={f"/cas/{NAME}": DATA})) as side:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{side.port}")
        yield side


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("403", "it answers 403; the credentials are not taken"),
        ("500", "it answers 500"),
        ("hang", "it does not answer"),
        ("drip", "less than 10000 bytes a second"),
        ("cut", "partial response"),  # the rest of it is asked for, which this server does not give
        ("endless", "Content-Length"),
    ],
)
def test_a_bucket_that_misbehaves_is_named_in_one_sentence_and_soon(
    s3: CacheServer, tmp_path: Path, fault: str, words: str
) -> None:
    s3.fault, began = fault, time.monotonic()
    with pytest.raises(ResourceError, match=f"the remote cache s3://cache does not serve .*{words}") as said:
        open_remote("s3://cache", tmp_path).get("cas", NAME, tmp_path / "back", len(DATA))
    assert time.monotonic() - began < 5
    assert "--remote=off" in said.value.hint
    assert "s3cret" not in said.value.message


@pytest.mark.parametrize(
    ("fault", "words"), [("put-403", "it answers 403"), ("put-500", "it answers 500"), ("put-hang", "does not answer")]
)
def test_a_bucket_that_takes_nothing_is_named_soon(s3: CacheServer, tmp_path: Path, fault: str, words: str) -> None:
    s3.fault, began = fault, time.monotonic()
    (tmp_path / "data").write_bytes(DATA)
    with pytest.raises(ResourceError, match=words):
        open_remote("s3://cache", tmp_path).put("cas", NAME, tmp_path / "data")
    assert time.monotonic() - began < 5


def test_a_request_to_a_bucket_may_last_longer_than_a_line_may_be_silent(s3: CacheServer, tmp_path: Path) -> None:
    """The library's own 30 seconds for a whole request are less than some gigabytes need."""
    s3.fault, s3.patience = SLOW, 0.8
    assert open_remote("s3://cache", tmp_path).get("cas", NAME, tmp_path / "back", len(DATA))
    assert (tmp_path / "back").read_bytes() == DATA


@pytest.mark.parametrize("code", bucket.NO_BUCKET)
def test_a_bucket_that_is_not_there_is_no_miss(s3: CacheServer, tmp_path: Path, code: str) -> None:
    s3.held.clear()
    assert not open_remote("s3://cache", tmp_path).has("cas", NAME)
    s3.absent = f"<Error><Code>{code}</Code></Error>".encode()
    for ask in ("has", "get"):
        place = open_remote("s3://cache", tmp_path)
        with pytest.raises(ResourceError, match="there is no such bucket"):
            place.has("cas", NAME) if ask == "has" else place.get("cas", NAME, tmp_path / "back", 1)


def test_a_bucket_without_credentials_or_without_a_safe_line(
    s3: CacheServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert s3.held
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(ResourceError, match="http://, which is not allowed") as said:
        open_remote("s3://cache", tmp_path).has("cas", NAME)
    assert "AWS_ALLOW_HTTP" in said.value.hint
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(ResourceError, match="there are no credentials") as said:
        open_remote("s3://cache", tmp_path)
    assert "AWS_ACCESS_KEY_ID" in said.value.hint


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


def test_proxies_of_the_environment_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = "http://127.0.0.1:9"  # where nobody listens; a proxy is asked for the whole address
    with caching(CacheServer(held={f"{place}/cas/{NAME}": DATA})) as side:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{side.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        assert open_remote(place, tmp_path).get("cas", NAME, tmp_path / "back", len(DATA))
        with open_line(f"{place}/cas/{NAME}", None, {}, http.PATIENCE) as answer:
            assert answer.read() == DATA
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with pytest.raises(ResourceError, match="does not serve"):
            open_remote(place, tmp_path).has("cas", NAME)


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


@pytest.mark.parametrize("name", ["bc", "/etc/passwd", "../" * 20 + "x", "A" * 64])
def test_an_action_names_bytes_by_sha256_or_is_none(name: str) -> None:
    with pytest.raises(ValueError, match="calls a file's bytes"):
        decode(encode([File("a", name, 1)]))


@given(st.binary(max_size=60))
def test_any_bytes_are_an_action_or_none(data: bytes) -> None:
    try:
        decode(data)
    except ValueError:
        return


def test_letters_of_any_language_stand_in_an_address(tmp_path: Path) -> None:
    with caching(CacheServer(held={f"/für alle/cas/{NAME}": DATA})) as side:
        remote = open_remote(f"{side.url}/für alle", tmp_path)
        assert remote.has("cas", NAME)
        assert remote.get("cas", NAME, tmp_path / "back", len(DATA))
    assert (tmp_path / "back").read_bytes() == DATA


@pytest.mark.parametrize("address", ["https://localhost/x#part", "~nobody-of-this-name/x"])
def test_an_address_that_leads_elsewhere_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        open_remote(address, tmp_path)
