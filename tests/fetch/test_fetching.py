"""`forge fetch`, `forge lock` and `forge add`, against hosts that speak as the real ones do, and misbehave."""

from __future__ import annotations

import hashlib
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tomli

import sdforge.fetch as fetch
import sdforge.fetch.wire as wire
from sdforge.cli import main
from sdforge.lines import Patience
from tests.conftest import Project, new_project
from tests.families.toys import write_family
from tests.families.workbench import take
from tests.fetch.conftest import Forge
from tests.fetch.server import COMMIT, Host, serving

DATA = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(DATA).hexdigest()


def source(root: Path, text: str, **more: str) -> None:
    """Declare the source `it`."""
    rows = "".join(f"{key} = {json.dumps(value)}\n" for key, value in more.items())
    (root / "forge.toml").write_text(f"[source.it]\nfrom = {json.dumps(text)}\n{rows}")


def pinned(root: Path) -> dict[str, Any]:
    row: dict[str, Any] = tomli.loads((root / "forge.lock").read_text())["source"]["it"]
    return row


def fetched(root: Path) -> list[Path]:
    folder = root / "cache" / "v1" / "fetched"
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".complete")


def civitai(host: Host, **file: Any) -> None:
    """Let a model with one version be on Civitai."""
    row = {"id": 5, "name": "m.safetensors", "primary": True, "sizeKB": len(DATA) / 1024} | file
    row |= {"hashes": {"SHA256": SHA256.upper()}, "downloadUrl": f"{host.url}/api/download/models/34"}
    host.json["/api/v1/model-versions/34"] = {"id": 34, "modelId": 12, "trainedWords": ["mip "], "files": [row]}
    host.json["/api/v1/models/12"] = {"id": 12, "modelVersions": [{"id": 34}]}
    host.files["/api/download/models/34"] = DATA


# -- forms -------------------------------------------------------------------------------------------------------------


def test_a_file_of_the_hub_is_pinned_to_its_commit(root: Path, host: Host, forge: Forge) -> None:
    host.repositories["a/b"] = {"x.safetensors": DATA}
    source(root, "hf://a/b/x.safetensors")
    said = forge("fetch")
    assert "fetched" in said.out
    assert [p.read_bytes() for p in fetched(root)] == [DATA]
    row = pinned(root)
    assert row["from"] == "hf://a/b/x.safetensors"
    assert row["resolved"] == f"hf://a/b@{COMMIT}/x.safetensors"
    assert (row["files"], row["size"]) == ({"x.safetensors": SHA256}, len(DATA))


@pytest.mark.parametrize(
    "text", ["civitai.com/models/12", "civitai.com/models/12?modelVersionId=34", "urn:air:sd1:lora:civitai:12@34"]
)
def test_a_page_of_civitai_is_pinned_to_version_and_file(root: Path, host: Host, forge: Forge, text: str) -> None:
    civitai(host)
    source(root, text)
    forge("fetch", "it")
    row = pinned(root)
    assert (row["resolved"], row["files"]) == ("air:any:model:civitai:12@34+5", {"m.safetensors": SHA256})


def test_a_url_is_pinned_by_what_came(root: Path, host: Host, forge: Forge) -> None:
    host.files["/some/x.safetensors"] = DATA
    source(root, f"{host.url}/some/x.safetensors")
    forge("fetch")
    assert pinned(root)["files"] == {"x.safetensors": SHA256}
    assert "here" in forge("fetch").out
    assert len([a for a in host.asked if a[0] == "/some/x.safetensors"]) == 1


# -- what goes wrong on the way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
def test_a_line_that_breaks_is_taken_up_again(root: Path, host: Host, forge: Forge, ranges: bool) -> None:
    host.repositories["a/b"] = {"x.safetensors": DATA}
    host.faults, host.ranges = ["cut", "503", "cut", ""], ranges
    source(root, "hf://a/b/x.safetensors")
    forge("fetch")
    assert [p.read_bytes() for p in fetched(root)] == [DATA]
    assert any(asked for _, asked, _ in host.asked)


def test_what_has_come_is_kept_for_the_next_command(root: Path, host: Host, forge: Forge) -> None:
    host.repositories["a/b"] = {"x.safetensors": DATA}
    host.faults = ["cut"] + ["503"] * (wire.TRIES - 1)
    source(root, "hf://a/b/x.safetensors")
    said = forge("fetch", code=4)
    assert "goes on from there" in said.out
    host.asked.clear()
    forge("fetch")
    assert [p.read_bytes() for p in fetched(root)] == [DATA]
    assert [asked for path, asked, _ in host.asked if "resolve" in path] == [f"bytes={len(DATA) // 2}-"]


def test_what_has_come_of_a_file_that_nothing_promises_is_not_joined_to_another(
    root: Path, host: Host, forge: Forge
) -> None:
    host.files["/x.safetensors"] = DATA
    host.faults = ["cut"] + ["503"] * (wire.TRIES - 1)
    source(root, f"{host.url}/x.safetensors")
    forge("fetch", code=4)
    host.files["/x.safetensors"] = other = DATA[::-1]
    forge("fetch")
    assert [p.read_bytes() for p in fetched(root)] == [other]


def test_a_line_that_stands_still_is_left(
    root: Path, host: Host, forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "PATIENCE", Patience(silent=0.2, seconds=0.2, slowest=1000))
    host.repositories["a/b"] = {"x.safetensors": DATA}
    host.faults = ["stall", ""]
    source(root, "hf://a/b/x.safetensors")
    forge("fetch")
    assert [p.read_bytes() for p in fetched(root)] == [DATA]


@pytest.mark.parametrize(("fault", "words"), [("wrong", "another file than was promised"), ("long", "is longer than")])
def test_other_bytes_than_promised_are_refused_and_not_kept(
    root: Path, host: Host, forge: Forge, fault: str, words: str
) -> None:
    host.repositories["a/b"] = {"x.safetensors": DATA}
    host.faults = [fault]
    source(root, "hf://a/b/x.safetensors")
    said = forge("fetch", code=3)
    assert words in said.out
    assert not [p for p in fetched(root) if p.parent.name != "parts"]
    forge("fetch")
    assert [p.read_bytes() for p in fetched(root)] == [DATA]


def test_the_declared_sha256_goes_before_what_a_page_says(root: Path, host: Host, forge: Forge) -> None:
    host.repositories["a/b"] = {"x.safetensors": DATA}
    source(root, "hf://a/b/x.safetensors", sha256="0" * 64)
    said = forge("fetch", code=3)
    assert f"forge.toml says {'0' * 64}; its page says {SHA256}" in said.out
    assert not fetched(root)


def test_a_file_that_changed_behind_its_address_is_refused_until_it_is_taken(
    root: Path, tmp_path: Path, host: Host, forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.files["/x.safetensors"] = DATA
    source(root, f"{host.url}/x.safetensors")
    forge("fetch")
    host.files["/x.safetensors"] = DATA[::-1]
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "another"))
    said = forge("fetch", code=3)
    assert "another file than was promised" in said.out
    assert "forge lock --update" in said.out
    assert pinned(root)["files"] == {"x.safetensors": SHA256}
    forge("lock", "--update")
    assert pinned(root)["files"] == {"x.safetensors": hashlib.sha256(DATA[::-1]).hexdigest()}
    assert "here" in forge("fetch").out


def test_a_folder_of_which_a_file_is_missing_is_not_said_to_be_whole(root: Path, host: Host, forge: Forge) -> None:
    host.repositories["a/b"] = {"model_index.json": b"{}", "unet/diffusion_pytorch_model.safetensors": DATA}
    host.faults = ["", "404"]
    source(root, "hf://a/b")
    forge("fetch", code=2)
    assert list((root / "cache").rglob(".complete")) == []
    forge("fetch")
    assert len(list((root / "cache").rglob(".complete"))) == 1


def test_a_host_that_answers_for_a_pinned_revision_with_another_is_refused(
    root: Path, host: Host, forge: Forge
) -> None:
    host.repositories["a/b"] = {"x.safetensors": DATA}
    source(root, "hf://a/b/x.safetensors")
    forge("fetch")
    _, described = host.answer("/api/models/a/b")
    host.json[f"/api/models/a/b/revision/{COMMIT}"] = described | {"sha": "f" * 40}
    assert f"is hf://a/b@{'f' * 40}/x.safetensors now" in forge("fetch", code=3).out
    assert pinned(root)["resolved"] == f"hf://a/b@{COMMIT}/x.safetensors"


def test_a_web_page_is_no_file(root: Path, host: Host, forge: Forge) -> None:
    civitai(host)
    host.faults = ["html"]
    source(root, "civitai.com/models/12")
    said = forge("fetch", code=4)
    assert "a web page instead of a file" in said.out
    assert "CIVITAI_TOKEN" in said.out


def test_what_is_not_there_is_said_and_does_not_stop_the_others(root: Path, host: Host, forge: Forge) -> None:
    host.repositories["a/b"] = {"x.safetensors": DATA}
    (root / "forge.toml").write_text(
        '[source.no]\nfrom = "hf://a/none/x.safetensors"\n[source.it]\nfrom = "hf://a/b/x.safetensors"\n'
        '[source.file]\nfrom = "hf://a/b/y.safetensors"\n'
    )
    said = forge("fetch", code=2)
    assert "the Hub has no a/none at main" in said.out
    assert "a/b has no y.safetensors at main" in said.out
    assert "it has x.safetensors" in said.out
    assert [p.read_bytes() for p in fetched(root)] == [DATA]


@pytest.mark.usefixtures("host")
def test_a_host_that_is_not_to_be_reached(root: Path, forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("HF_ENDPOINT", "CIVITAI_ENDPOINT"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    source(root, "hf://a/b/x.safetensors")
    assert "the Hub could not be asked" in forge("fetch", code=4).out
    source(root, "civitai.com/models/12")
    assert "could not be reached" in forge("fetch", code=4).out


# -- secrets -----------------------------------------------------------------------------------------------------------


def test_a_token_goes_to_its_own_host_and_nowhere_else(
    root: Path, host: Host, forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("CIVITAI_TOKEN", "civitai_secret")
    with serving(Host(files={f"/a/b/resolve/{COMMIT}/x.safetensors": DATA})) as store:
        host.repositories["a/b"], host.redirect, host.secret = {"x.safetensors": DATA}, store.url, "hf_secret"
        source(root, "hf://a/b/x.safetensors")
        said = forge("fetch", "--json")
        assert {token for _, _, token in store.asked} == {""}
    assert {token for _, _, token in host.asked} == {"Bearer hf_secret"}
    texts = [p.read_bytes() for p in root.rglob("*") if p.is_file()] + [said.out.encode(), said.err.encode()]
    assert not any(b"_secret" in text for text in texts)


def test_a_gated_file_says_what_to_do(root: Path, host: Host, forge: Forge) -> None:
    host.repositories["a/b"], host.secret = {"x.safetensors": DATA}, "hf_secret"
    source(root, "hf://a/b/x.safetensors")
    said = forge("fetch", code=4)
    assert "does not give" in said.out
    assert "HF_TOKEN" in said.out


def test_a_redirect_to_a_line_that_anybody_can_change_is_refused(root: Path, host: Host, forge: Forge) -> None:
    host.files["/x.safetensors"], host.redirect = DATA, "http://example.org"
    source(root, f"{host.url}/x.safetensors")
    assert "a line that anybody can change" in forge("fetch", code=2).out


# -- what is here already ----------------------------------------------------------------------------------------------


def test_a_file_of_this_machine_is_linked_instead_of_fetched(
    root: Path, tmp_path: Path, host: Host, forge: Forge
) -> None:
    civitai(host)
    (tmp_path / "comfy" / "loras").mkdir(parents=True)
    (tmp_path / "comfy" / "loras" / "renamed.safetensors").write_bytes(DATA)
    (tmp_path / "comfy" / "loras" / "other.safetensors").write_bytes(DATA[::-1])
    (root / "forge.local.toml").write_text(f'folders = ["{tmp_path}/comfy"]\n')
    source(root, "civitai.com/models/12")
    said = forge("fetch")
    assert f"it lay at {tmp_path}/comfy/loras/renamed.safetensors" in said.out
    assert not [path for path, _, _ in host.asked if "download" in path]


def test_what_the_hub_s_own_programs_have_is_linked(root: Path, tmp_path: Path, host: Host, forge: Forge) -> None:
    host.repositories["a/b"] = {"x.safetensors": DATA}
    blob = tmp_path / "hub" / "hub" / "models--a--b" / "blobs" / SHA256
    link = blob.parents[1] / "snapshots" / COMMIT / "x.safetensors"
    for folder in (blob.parent, link.parent):
        folder.mkdir(parents=True)
    blob.write_bytes(DATA)
    link.symlink_to(blob)
    source(root, "hf://a/b/x.safetensors")
    assert f"it lay at {blob}" in forge("fetch").out
    assert not [path for path, _, _ in host.asked if "resolve" in path]
    blob.unlink()
    assert "fetched" in forge("fetch").out


def test_clean_keeps_what_a_project_declares_and_nothing_else(root: Path, host: Host, forge: Forge) -> None:
    host.repositories["a/b"] = {"x.safetensors": DATA}
    source(root, "hf://a/b/x.safetensors")
    forge("fetch")
    forge("clean")
    assert fetched(root)
    (root / "forge.toml").write_text("")
    forge("clean")
    assert not fetched(root)


def test_what_one_project_fetched_is_not_cleaned_away_by_another(
    root: Path, tmp_path: Path, host: Host, forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the first has built nothing yet; and while it fetches nobody cleans."""
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "shared"))
    other = tmp_path / "other"
    (other / "recipes").mkdir(parents=True)
    (other / "forge.toml").write_text("")
    host.repositories["a/b"] = {"x.safetensors": DATA}
    source(root, "hf://a/b/x.safetensors")
    codes: list[int] = []
    download = fetch.download

    def clean_meanwhile(*given: Any) -> str:
        codes.append(main(["-C", str(other), "clean"]))
        return download(*given)

    monkeypatch.setattr(fetch, "download", clean_meanwhile)
    forge("fetch")
    assert codes == [5]
    forge("clean", at=other)
    assert "here" in forge("fetch").out


# -- lock --------------------------------------------------------------------------------------------------------------


def test_lock_pins_without_bytes_and_follows_a_branch_only_when_asked(root: Path, host: Host, forge: Forge) -> None:
    host.repositories["a/b"] = {"x.safetensors": DATA}
    source(root, "hf://a/b/x.safetensors")
    said = forge("lock")
    assert f"source it is pinned: hf://a/b@{COMMIT}/x.safetensors" in said.out
    assert pinned(root)["files"] == {"x.safetensors": SHA256}
    assert not fetched(root)
    host.commit = "f" * 40
    forge("lock")
    assert COMMIT in pinned(root)["resolved"]
    said = forge("lock", "--update")
    assert "f" * 40 in pinned(root)["resolved"]


# -- add ---------------------------------------------------------------------------------------------------------------


def test_add_writes_a_table_and_leaves_the_rest_alone(root: Path, host: Host, forge: Forge) -> None:
    civitai(host)
    before = "# ours\ndefault = []   # nothing yet\n"
    (root / "forge.toml").write_text(before)
    said = forge("add", "mip", "air:sd1:lora:civitai:12@34", "--licence", "CC0-1.0")
    text = (root / "forge.toml").read_text()
    assert text.startswith(before)
    assert tomli.loads(text)["source"]["mip"] == {
        "from": "air:sd1:lora:civitai:12@34",
        "sha256": SHA256,
        "licence": "CC0-1.0",
        "trigger": ["mip"],
    }
    assert "`forge fetch mip` gets it" in said.out
    forge("check")
    assert "fetched" in forge("fetch", "mip").out


def test_add_leaves_a_file_alone_that_no_table_can_follow(root: Path, host: Host, forge: Forge) -> None:
    host.repositories["a/b"] = {"x.safetensors": DATA}
    before = 'source = { old = { from = "x.safetensors" } }\n'
    (root / "forge.toml").write_text(before)
    assert "is left as it is" in forge("add", "new", "hf://a/b/x.safetensors", code=2).err
    assert (root / "forge.toml").read_text() == before
    forge("check")


def test_add_keeps_what_kind_of_file_it_is(root: Path, tmp_path: Path, host: Host, forge: Forge) -> None:
    host.repositories["a/b"] = {"x.safetensors": DATA}
    shared = tmp_path / "shared.toml"
    (root / "forge.toml").rename(shared)
    shared.chmod(0o600)
    (root / "forge.toml").symlink_to(shared)
    forge("add", "new", "hf://a/b/x.safetensors")
    assert (root / "forge.toml").is_symlink()
    assert "[source.new]" in shared.read_text()
    assert shared.stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("host")
def test_several_that_add_at_once_lose_nothing(root: Path) -> None:
    def add(name: str) -> int:
        return main(["-C", str(root), "add", name, f"https://example.org/{name}.safetensors", "--offline"])

    names = [f"s{i}" for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(add, names)) == {0}
    assert sorted(tomli.loads((root / "forge.toml").read_text())["source"]) == sorted(names)


def test_add_takes_the_licence_from_the_hub_and_links_what_is_here(
    root: Path, tmp_path: Path, host: Host, forge: Forge
) -> None:
    host.repositories["a/b"] = {"x.safetensors": DATA}
    (tmp_path / "x.safetensors").write_bytes(DATA)
    (root / "forge.local.toml").write_text(f'folders = ["{tmp_path}"]\n')
    said = forge("add", "x", "hf://a/b/x.safetensors")
    assert "licence: cc0-1.0" in said.out
    assert f"it is on this machine: {tmp_path}/x.safetensors" in said.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("Bad", "hf://a/b"), "is no name"),
        (("it", "hf://a/b"), "forge.toml has a 'it' already"),
        (("new", "nowhere.safetensors"), "there is no nowhere.safetensors in the project"),
        (("new", "hf://a"), "names no file of the Hub"),
        (("new", "hf://a/b", "--sha256", "zz"), "sha256"),
        (("new", ""), "nothing is named"),
        (("soft", "hf://a/b/x.safetensors"), "recipes/r.toml has a 'soft' of its own"),
    ],
)
@pytest.mark.usefixtures("host")
def test_add_refuses_what_could_not_be_used(root: Path, forge: Forge, arguments: tuple[str, ...], words: str) -> None:
    source(root, "hf://a/b/x.safetensors")
    (root / "recipes" / "r.toml").write_text('family = "sd15"\n[cast.soft]\ncheckpoint = "it"\ndtype = "fp16"\n')
    before = (root / "forge.toml").read_text()
    said = forge("add", *arguments, code=2)
    assert words in said.err
    assert (root / "forge.toml").read_text() == before


@pytest.mark.parametrize("written", ["deep/./x.safetensors", "ROOT/deep/x.safetensors", "x.safetensors"])
def test_add_takes_a_path_as_a_person_has_it(root: Path, forge: Forge, toy_checkpoint: Path, written: str) -> None:
    data = (toy_checkpoint / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    (root / "deep").mkdir()
    (root / "deep" / "x.safetensors").write_bytes(data)
    at, sha256 = root / "deep" if written == "x.safetensors" else root, hashlib.sha256(data).hexdigest()
    forge("add", "x", written.replace("ROOT", str(root)), "--sha256", sha256.upper(), at=at)
    found = tomli.loads((root / "forge.toml").read_text())["source"]
    assert found == {"x": {"from": "deep/x.safetensors", "sha256": sha256}}


def test_names_that_are_none_get_a_guess(root: Path, forge: Forge) -> None:
    source(root, "hf://a/b/x.safetensors")
    assert "did you mean 'it'?" in forge("fetch", "itt", code=2).err


# -- the whole way -----------------------------------------------------------------------------------------------------


def test_another_machine_gets_the_same_from_git_and_the_hosts(tmp_path: Path, toy_checkpoint: Path, host: Host) -> None:
    files = {str(p.relative_to(toy_checkpoint)): p.read_bytes() for p in toy_checkpoint.rglob("*") if p.is_file()}
    host.repositories["toys/base"] = files | {"README.md": b"x", "base.safetensors": b"y"}
    one = new_project(tmp_path / "one", toy_checkpoint)
    one.edit('from = "base"', 'from = "hf://toys/base"', file="forge.toml")
    (one.root / "base").rename(tmp_path / "away")
    said = one.forge("build", code=2)
    assert "`forge fetch base` gets it" in said.err
    one.forge("fetch")
    assert one.build().built == ["a", "b", "c", "preset.export"]
    host.commit = "e" * 40  # the branch goes on, and nobody is asked
    assert one.build().built == []
    host.commit = COMMIT

    (config,) = (one.root / "cache" / "v1" / "fetched").glob("*/vae/config.json")
    config.unlink()  # without it the VAE is another one
    assert "`forge fetch base` gets it" in one.forge("plan", code=2).err
    one.forge("fetch")
    assert one.build().built == []

    two: Project = one.clone(tmp_path / "two")
    two.forge("fetch")
    assert two.lock == one.lock
    assert two.build().built == ["a", "b", "c", "preset.export"]
    assert two.lock == one.lock
    assert two.output.read_bytes() == one.output.read_bytes()
    assert not [path for path, _, _ in host.asked if path.endswith(("README.md", "base.safetensors"))]


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_a_repository_of_one_network_is_that_network(
    part: str, root: Path, host: Host, forge: Forge, tmp_path: Path
) -> None:
    """With the same weights once more in other types and under other names, as such repositories have them."""
    weights = "diffusion_pytorch_model.safetensors"
    toy = write_family(tmp_path / "toy", "sd15") / part
    files = {name: (toy / name).read_bytes() for name in ("config.json", weights)}
    more = ("diffusion_pytorch_model.bin", f"{weights.replace('.', '.fp16.')}", "own.safetensors", f"images/{weights}")
    host.repositories["a/b"] = files | dict.fromkeys(more, DATA)
    source(root, "hf://a/b")
    forge("fetch")
    assert {path.name for path in fetched(root)} == set(files)
    assert set(take(fetched(root)[0].parent).artifact.components) == {part}
