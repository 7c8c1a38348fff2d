"""Hosts that answer what they should not, what lies in the cache instead of a download, and secrets."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from huggingface_hub import close_session

import sdforge.fetch.wire as wire
from sdforge.lines import Patience
from tests.conftest import new_project
from tests.fetch.conftest import Forge
from tests.fetch.server import COMMIT, Handler, Host, serving
from tests.fetch.test_fetching import DATA, SHA256, civitai, fetched, pinned, source

SECRET = "hf_CANARY"


@contextmanager
def answering(do: Callable[[Any], None]) -> Iterator[Host]:
    """Serve a host of which each answer is what `do` makes of it."""

    class Odd(Handler):
        def do_GET(self) -> None:  # noqa: N802 -- as the library calls it
            self.host.asked.append((self.path, self.headers.get("Range", ""), self.headers.get("Authorization", "")))
            do(self)

    with serving(Host(), Odd) as side:
        yield side


def send(handler: Handler, body: bytes, code: int = 200, *, cut: int = 0, **headers: str) -> None:
    """Answer with bytes, of which `cut` are missing at the end."""
    handler.send_response(code)
    for name, value in {"Content_Type": "application/octet-stream", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) - cut])
    handler.close_connection = bool(cut)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PAUSE", 0.001)


# -- bytes of another file ---------------------------------------------------------------------------------------------


def test_a_file_that_changes_while_it_comes_is_not_put_together_from_both(root: Path, forge: Forge) -> None:
    def change(handler: Handler) -> None:
        first = len(side.asked) == 1
        data, asked = (DATA, "") if first else (DATA[::-1], handler.headers.get("Range", ""))
        begin = int(asked.removeprefix("bytes=").rstrip("-") or 0)
        more = {"Content_Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if begin else {}
        send(handler, data[begin:], 206 if begin else 200, cut=len(data) // 2 if first else 0, **more)

    with answering(change) as side:
        source(root, f"{side.url}/x.safetensors")
        forge("fetch")
    assert [path.read_bytes() for path in fetched(root)] == [DATA[::-1]]


@pytest.mark.parametrize("more", [{"Content_Range": f"bytes 24-{len(DATA) - 1}/{len(DATA)}"}, {}])
def test_an_answer_that_begins_elsewhere_is_not_taken(root: Path, forge: Forge, more: dict[str, str]) -> None:
    def begin_elsewhere(handler: Handler) -> None:
        if handler.headers.get("Range"):
            send(handler, DATA[24:], 206, **more)
        else:
            send(handler, DATA, cut=1000 if len(side.asked) == 1 else 0, ETag='"1"')

    with answering(begin_elsewhere) as side:
        source(root, f"{side.url}/x.safetensors")
        forge("fetch")
    assert [path.read_bytes() for path in fetched(root)] == [DATA]


def test_bytes_that_come_packed_are_refused(root: Path, forge: Forge) -> None:
    with answering(lambda handler: send(handler, gzip.compress(DATA), Content_Encoding="gzip")) as side:
        source(root, f"{side.url}/x.safetensors")
        assert "comes packed (gzip)" in forge("fetch", code=4).out
    assert not [path for path in fetched(root) if path.parent.name != "parts"]


# -- answers of another shape ------------------------------------------------------------------------------------------

VERSION = {"id": 5, "name": "m.safetensors", "hashes": {"SHA256": SHA256}, "downloadUrl": "http://127.0.0.1:1/"}
ODD_ANSWERS: dict[str, Any] = {
    "a list": [],
    "nothing": None,
    "versions that are none": {"modelVersions": [3], "files": [3]},
    "a number that is none": {"modelVersions": [{"id": "x"}], "files": [VERSION | {"id": "x"}]},
    "a size without end": {"modelVersions": [{}], "files": [VERSION | {"sizeKB": float("inf")}]},
    "a digest that leads away": {"modelVersions": [{}], "files": [VERSION | {"hashes": {"SHA256": "../../../etc"}}]},
}


@pytest.mark.parametrize("reference", ["civitai.com/models/12", "civitai.com/models/12?modelVersionId=34"])
@pytest.mark.parametrize("name", ODD_ANSWERS)
def test_an_answer_that_is_not_understood_is_said_in_one_sentence(
    root: Path, forge: Forge, monkeypatch: pytest.MonkeyPatch, name: str, reference: str
) -> None:
    body = json.dumps(ODD_ANSWERS[name]).encode()
    with answering(lambda handler: handler.send(200, body, "application/json")) as side:
        monkeypatch.setenv("CIVITAI_ENDPOINT", side.url)
        source(root, reference)
        assert "is not understood" in forge("fetch", code=4).out


def test_json_without_end_in_depth_is_no_json(root: Path, forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(lambda handler: handler.send(200, b"[" * 100_000, "application/json")) as side:
        monkeypatch.setenv("CIVITAI_ENDPOINT", side.url)
        source(root, "civitai.com/models/12")
        assert "answers no JSON" in forge("fetch", code=4).out


NO_NAMES = ("CON.safetensors", "nul", "x.safetensors.", "x ", ".hidden", "a/b", "a\\b", "x\n", "\u202ex", "x" * 256)


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_no_file_can_have_everywhere_is_refused(root: Path, host: Host, forge: Forge, name: str) -> None:
    civitai(host, name=name)
    source(root, "civitai.com/models/12")
    assert "is no name that a file can have everywhere" in forge("fetch", code=2).out
    assert not fetched(root)


@pytest.mark.parametrize("place", ["http://[::1", "https://h:abc/x", "https://h:99999/x", "https:///x"])
def test_a_redirect_to_nowhere_is_said_in_one_sentence(root: Path, forge: Forge, place: str) -> None:
    with answering(lambda handler: send(handler, b"", 302, Location=place)) as side:
        source(root, f"{side.url}/x.safetensors")
        assert "leads to" in forge("fetch", code=2).out


# -- lines -------------------------------------------------------------------------------------------------------------


def test_letters_of_any_language_stand_in_an_address(root: Path, host: Host, forge: Forge) -> None:
    host.files["/bilder/ä b.safetensors"] = DATA
    source(root, f"{host.url}/bilder/ä b.safetensors")
    forge("fetch")
    assert pinned(root)["files"] == {"ä b.safetensors": SHA256}


@pytest.fixture
def fresh_client() -> Iterator[None]:
    """The Hub's library reads the variables when it is first asked, and keeps its client."""
    close_session()
    yield
    close_session()


@pytest.mark.usefixtures("fresh_client")
@pytest.mark.parametrize("reference", ["http://127.0.0.1:1/x.safetensors", "hf://a/b/x.safetensors"])
def test_the_usual_variables_name_a_proxy(
    root: Path, forge: Forge, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    """Nobody listens at port 1: what comes from there came through the proxy, which is asked with whole addresses."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    side = Host(files={"/x.safetensors": DATA}, repositories={"a/b": {"x.safetensors": DATA}})
    with serving(side) as proxy:
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        source(root, reference)
        forge("fetch")
        assert [path.read_bytes() for path in fetched(root)] == [DATA]


# -- secrets -----------------------------------------------------------------------------------------------------------


def test_a_token_goes_along_where_its_own_host_leads_on(
    root: Path, forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does the Hub with the small files of a repository that is not public, and with one that was renamed."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    about = Host(repositories={"a/b": {"x.safetensors": DATA}})

    def lead_on(handler: Handler) -> None:
        path = urlsplit(handler.path).path
        if "/resolve/" in path:
            send(handler, b"", 307, Location=path.replace("/resolve/", "/api/resolve-cache/"))
        elif "/api/models/" in path:
            handler.send(200, json.dumps(about.answer(path)[1]).encode(), "application/json")
        elif handler.headers.get("Authorization") != f"Bearer {SECRET}":
            handler.send(401, b"", "text/plain")
        else:
            send(handler, DATA)

    with answering(lead_on) as side:
        monkeypatch.setenv("HF_ENDPOINT", side.url)
        source(root, "hf://a/b/x.safetensors")
        forge("fetch")
    assert [path.read_bytes() for path in fetched(root)] == [DATA]


@pytest.mark.parametrize(
    ("name", "reference"), [("CIVITAI_TOKEN", "civitai.com/models/12"), ("HF_TOKEN", "hf://a/b/x.pt")]
)
@pytest.mark.parametrize("end", ["\n", "\x01", "ü"])
def test_a_token_that_cannot_be_sent_is_not_shown(
    root: Path, host: Host, forge: Forge, monkeypatch: pytest.MonkeyPatch, name: str, reference: str, end: str
) -> None:
    monkeypatch.setenv(name, f"{SECRET}{end}")
    civitai(host)
    host.repositories["a/b"] = {"x.pt": DATA}
    source(root, reference)
    said = forge("fetch", code=0 if end.isspace() else 2)  # the end of a line is no part of it
    assert SECRET not in said.out + said.err
    assert {token for _, _, token in host.asked} <= {f"Bearer {SECRET}"}


IN_ADDRESSES = (
    f"https://civitai.com/api/download/models/34?type=Model&token={SECRET}",
    f"https://example.org/x.safetensors?X-Amz-Signature={SECRET}",
    f"https://example.org/x.safetensors?sig={SECRET}",
    f"https://me:{SECRET}@example.org/x.safetensors",
    f"https://{SECRET}@huggingface.co/a/b/resolve/main/x.safetensors",
)


READING = ("fetch", "lock", "list --sources", "list --sources --json", "check", "check --json", "fetch --json")


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("address", IN_ADDRESSES)
def test_a_secret_in_an_address_is_refused_and_gets_nowhere(root: Path, forge: Forge, address: str) -> None:
    said = [forge("add", "it", address, code=2), forge("add", "it", address, "--offline", code=2)]
    assert SECRET not in (root / "forge.toml").read_text()
    source(root, address)
    said += [forge(*command.split(), code=2) for command in READING]
    (root / "forge.toml").write_text(f'[remote]\naddress = "{address}"\n')
    said += [forge(*command.split(), code=2) for command in READING]
    source(root, "x.safetensors")
    (root / "recipes/r.toml").write_text(f'family = "sd15"\n[source.mine]\nfrom = "{address}"\n')
    said += [forge("check", code=2), forge("check", "--json", code=2)]
    assert all("which git would keep" in each.out + each.err for each in said)
    assert not any(SECRET in each.out + each.err for each in said)
    files = (path for path in root.rglob("*") if path.is_file() and path.name != "r.toml")
    assert not any(SECRET.encode() in path.read_bytes() for path in files)


# -- what lies in the cache --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["link", "loop", "pipe", "folder", "nowhere"])
@pytest.mark.parametrize("where", ["place", "part"])
def test_what_lies_in_a_downloads_place_is_never_written_through(
    root: Path, tmp_path: Path, host: Host, forge: Forge, what: str, where: str
) -> None:
    host.repositories["a/b"] = {"x.safetensors": DATA}
    source(root, "hf://a/b/x.safetensors")
    folder = root / "cache" / "v1" / "fetched"
    if where == "part":
        host.faults = ["cut"] + ["503"] * (wire.TRIES - 1)
        forge("fetch", code=4)
        (path,) = (folder / "parts").iterdir()
    else:
        forge("fetch")
        path = folder / SHA256 / "x.safetensors"
    path.unlink()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    put: dict[str, Callable[[], Any]] = {
        "link": lambda: path.symlink_to(victim),
        "loop": lambda: path.symlink_to(path),
        "pipe": lambda: os.mkfifo(path),
        "folder": lambda: path.mkdir(),
        "nowhere": lambda: path.symlink_to("/nowhere/at/all"),
    }
    put[what]()
    forge("fetch")
    assert victim.read_text() == "mine"
    place = folder / SHA256 / "x.safetensors"
    assert (place.is_symlink(), place.read_bytes()) == (False, DATA)


def test_what_cannot_be_kept_does_not_stop_the_others(root: Path, host: Host, forge: Forge) -> None:
    host.files |= {"/x.safetensors": DATA, "/y.safetensors": DATA[::-1]}
    rows = [f'[source.{name}]\nfrom = "{host.url}/{name}.safetensors"\n' for name in "xy"]
    (root / "forge.toml").write_text("\n".join(rows))
    in_the_way = root / "cache" / "v1" / "fetched" / SHA256
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("no folder")
    said = forge("fetch", code=4)
    assert "✗ x" in said.out
    assert "✓ y" in said.out


def test_a_linked_file_that_changes_is_not_what_was_fetched(tmp_path: Path, toy_checkpoint: Path, host: Host) -> None:
    """Else the lock would say of other bytes that they came from there, and no other machine could get them."""
    one = new_project(tmp_path / "one", toy_checkpoint)
    one.forge("convert", "base", "base.safetensors")
    there = tmp_path / "models" / "base.safetensors"
    there.parent.mkdir()
    (one.root / "base.safetensors").rename(there)
    data = there.read_bytes()
    host.repositories["toys/base"] = {"base.safetensors": data}
    (one.root / "forge.local.toml").write_text(f'folders = ["{there.parent}"]\n')
    one.edit('from = "base"', 'from = "hf://toys/base/base.safetensors"', file="forge.toml")
    assert "linked" in one.forge("fetch").out
    assert one.build().built == ["a", "b", "c", "preset.export"]
    lock = one.lock
    there.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    said = one.forge("build", code=3)
    assert "is not the file that was fetched" in said.err
    assert "`forge fetch base` gets it again" in said.err
    one.forge("fetch")
    assert one.build().built == []
    assert one.lock == lock
    assert f"@{COMMIT}/" in lock


def test_an_answer_that_comes_byte_by_byte_is_not_waited_for(
    root: Path, forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drip(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        with suppress(OSError):  # the other side is gone
            for _ in range(100):
                handler.wfile.write(b" ")
                time.sleep(0.05)

    monkeypatch.setattr(wire, "PATIENCE", Patience(silent=0.5, seconds=0.2, slowest=1000))
    monkeypatch.setattr(wire, "TRIES", 1)
    with answering(drip) as side:
        monkeypatch.setenv("CIVITAI_ENDPOINT", side.url)
        source(root, "civitai.com/models/12")
        began = time.monotonic()
        assert "less than 1000 bytes a second" in forge("fetch", code=4).out
        assert time.monotonic() - began < 3


@pytest.mark.parametrize("weights", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"])
def test_a_folder_without_weights_that_can_be_read_is_no_checkpoint(
    root: Path, host: Host, forge: Forge, weights: str
) -> None:
    host.repositories["a/b"] = {"model_index.json": b"{}", "unet/config.json": b"{}", f"unet/{weights}": DATA}
    source(root, "hf://a/b")
    said = forge("fetch", code=2).out
    assert "a/b is no folder of a checkpoint in safetensors" in said
    assert "name a file" in said
