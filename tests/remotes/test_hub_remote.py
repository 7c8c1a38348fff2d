"""A repository of the Hub as a remote cache, against a host that speaks the Hub's protocol."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from sdforge.errors import ResourceError, UsageError
from sdforge.remotes import Remote, open_remote
from tests.conftest import Project, new_project
from tests.quick import Quick
from tests.remotes.hub import Hub, hub
from tests.survival import RECIPE, Whole

DATA = b"some bytes" * 1000
NAME, ACTION = hashlib.sha256(DATA).hexdigest(), "ac" * 32
TOKEN = "hf_secret"


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub with a repository of models and one of data sets, which members may see."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # another protocol for the same bytes
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    with hub(**{"us/cache": {}, "datasets/us/cache": {}}) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        found.secret = TOKEN
        (tmp_path / "data").write_bytes(DATA)
        (tmp_path / "action").write_bytes(b"an action")
        yield found


@pytest.fixture(params=["hf://us/cache", "hf://datasets/us/cache", "hf://us/cache@main"])
def remote(request: pytest.FixtureRequest, side: Hub, tmp_path: Path) -> Remote:  # noqa: ARG001 -- it serves
    return open_remote(request.param, tmp_path)


def test_bytes_appear_with_their_action_in_one_commit(remote: Remote, side: Hub, tmp_path: Path) -> None:
    assert not remote.has("cas", NAME)
    assert not remote.get("cas", NAME, tmp_path / "back", len(DATA))
    remote.put("cas", NAME, tmp_path / "data")
    assert remote.has("cas", NAME)  # so that it is not put twice
    assert side.commits == []
    remote.put("ac", ACTION, tmp_path / "action")
    assert side.commits == [[f"ac/ac/{ACTION}", f"cas/{NAME[:2]}/{NAME}"]]
    assert remote.has("cas", NAME)
    assert remote.has("ac", ACTION)
    assert remote.get("cas", NAME, tmp_path / "back", len(DATA))
    assert (tmp_path / "back").read_bytes() == DATA
    assert remote.get("cas", NAME, tmp_path / "back", 10)
    assert (tmp_path / "back").read_bytes() == DATA[:10]


def test_the_token_goes_to_the_hub_and_not_to_where_bytes_lie(side: Hub, tmp_path: Path) -> None:
    remote = open_remote("hf://us/cache", tmp_path)
    with hub() as other:
        side.storage, side.blobs = other.url, other.blobs
        remote.put("cas", NAME, tmp_path / "data")
        remote.put("ac", ACTION, tmp_path / "action")
        other.blobs[hashlib.sha256(b"an action").hexdigest()] = b"an action"  # which the Hub keeps itself
        assert remote.get("cas", NAME, tmp_path / "back", len(DATA))
    assert {token for _, _, token in side.asked} == {f"Bearer {TOKEN}"}
    assert {(verb, token) for _, verb, token in other.asked} == {("PUT", ""), ("GET", "")}


def test_a_repository_that_is_not_shown_is_named_without_the_token(side: Hub, tmp_path: Path) -> None:
    side.secret = "another"
    remote = open_remote("hf://us/cache", tmp_path)
    for ask in (
        lambda: remote.has("cas", NAME),
        lambda: remote.get("cas", NAME, tmp_path / "back", 10),
        lambda: remote.put("cas", NAME, tmp_path / "data"),
    ):
        with pytest.raises(ResourceError, match=r"the remote cache at 127\.0\.0\.1:\d+ does not serve") as said:
            ask()
        assert TOKEN not in said.value.message + said.value.hint


@pytest.mark.parametrize("address", ["hf://cache", "hf://us/cache/file", "hf://spaces/us/cache", "hf://../x"])
def test_what_is_no_repository_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no repository of the Hub"):
        open_remote(address, tmp_path)


def test_a_mirror_that_would_hear_the_token_in_clear_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example")
    with pytest.raises(UsageError, match="over a line that anybody can change"):
        open_remote("hf://us/cache", tmp_path)


def test_another_machine_has_a_trained_result_from_the_hub_that_was_mended(
    side: Hub, toy_checkpoint: Path, tmp_path: Path
) -> None:
    one = new_project(tmp_path / "one", toy_checkpoint, RECIPE).root
    with (one / "forge.toml").open("a") as file:
        file.write('\n[remote]\naddress = "hf://datasets/us/cache"\n')
    quick = Quick()  # which takes the environment that the Hub is named in
    assert quick.forge(one, "build", "--json", "--remote=write").code == 0
    assert len(side.commits) == 1  # a commit a result
    files = side.repositories["datasets/us/cache"]
    other = b"something else"
    side.blobs[hashlib.sha256(other).hexdigest()] = other
    for name in files:  # as a commit of other bytes under these names would
        files[name] = other
    assert "put anew" in quick.forge(one, "push", "--verify").out
    assert side.commits[1:] == [sorted(files)]
    wrong = max(files, key=lambda name: len(files[name]))
    files[wrong] = other
    quick.forge(one, "push", "--verify")
    assert side.commits[2:] == [sorted(name for name in files if name == wrong or name.startswith("ac/"))]
    two = Project(one).clone(tmp_path / "two").root
    ran = quick.forge(two, "build", "--json")
    quick.close()
    assert [e["target"] for e in ran.of("action") if e["state"] == "fetched"] == ["toy:a"]
    assert not (two / "rehearsal.log").exists()
    assert Whole(one).differences(two) == []
    written = [path for root in (one, two) for path in root.rglob("*") if path.is_file()]
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
