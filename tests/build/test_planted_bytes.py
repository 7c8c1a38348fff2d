"""One wrong byte, in each place where bytes lie in turn: it is noticed, or it is of no matter. Never a wrong result."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fetch.server import Host, serving
from tests.quick import Quick
from tests.survival import Whole, flip, outputs

REMOTE = '\n[remote]\naddress = "shared"\n'


@pytest.fixture(scope="module")
def shared(whole: Whole, quick: Quick, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A project that was built, and whose remote cache (a folder in it) has what it trained."""
    root = whole.clone(tmp_path_factory.mktemp("planted") / "project")
    with (root / "forge.toml").open("a") as file:
        file.write(REMOTE)
    assert quick.forge(root, "build", "--json", "--remote=write").code == 0
    return Whole(root)


@pytest.fixture
def root(shared: Whole, tmp_path: Path) -> Path:
    """The same once more, without its exports, so that they are made from what lies in the cache."""
    root = shared.copy(tmp_path / "project")
    shutil.rmtree(root / "out")
    return root


def results(root: Path) -> list[Path]:
    return sorted((root / "cache/v1/results").glob("*/*/*.json"))


def trained(root: Path) -> dict[str, object]:
    """The record of the first training."""
    values = [json.loads(path.read_bytes()) for path in results(root)]
    return next(value for value in values if value["record"].get("target") == "toy:a")


def pack(root: Path) -> Path:
    (name,) = trained(root)["packs"]
    return root / "cache/v1/objects" / name[:2] / name


def table(root: Path) -> Path:
    name = trained(root)["components"]["text_encoder"][2]
    return root / "cache/v1/objects" / name[:2] / name


def entry(pattern: str) -> Callable[[Path], Path]:
    """Name the first file that fits a pattern."""
    return lambda root: next(path for path in sorted(root.glob(pattern)) if path.is_file())


PLACES: dict[str, Callable[[Path], Path]] = {
    "a source's weights": entry("base/unet/*.safetensors"),
    "a source's words": entry("base/tokenizer/vocab.json"),
    "a picture": entry("drawings/*.png"),
    "a caption": entry("drawings/*.txt"),
    "a pack": pack,
    "a table of tensors": table,
    "a record": lambda root: results(root)[0],
    "an alias": entry("cache/v1/aliases/*/*"),
    "a manifest": entry("cache/v1/preimages/*/*"),
    "a train state": entry("cache/v1/states/*/*/*.safetensors"),
    "the index": entry("cache/v1/index.db"),
    "the lock": entry("forge.lock"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_wrong_byte_at_home_is_noticed_or_of_no_matter(root: Path, shared: Whole, quick: Quick, place: str) -> None:
    flip(PLACES[place](root), root)
    changed = (root / "forge.lock").read_bytes()
    ran = quick.forge(root, "build", "--locked", "--json")
    assert "Traceback" not in ran.out + ran.err
    if ran.code == 0:
        assert shared.differences(root) == []
    else:
        assert ran.code in (2, 3), ran.out + ran.err
        assert outputs(root) == {}
        assert (root / "forge.lock").read_bytes() == changed


def test_a_wrong_byte_in_an_output_is_named_and_made_right(shared: Whole, quick: Quick, tmp_path: Path) -> None:
    root = shared.copy(tmp_path / "project")
    path = root / "out/toy/toy.safetensors"
    flip(path, path)
    assert "out/toy/toy.safetensors" in quick.forge(root, "verify", "--json").out
    assert quick.forge(root, "build", "--locked", "--json").code == 0
    assert shared.differences(root) == []


def test_a_wrong_byte_in_the_state_that_a_training_goes_on_from(root: Path, shared: Whole, quick: Quick) -> None:
    """It is passed over: an older state, or none, gives the same bytes."""
    for kind in ("results", "aliases", "index.db"):
        path = root / "cache/v1" / kind
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    newest = max((root / "cache/v1/states").glob("*/*/*.safetensors"), key=lambda path: int(path.stem))
    flip(newest, newest)
    (root / "rehearsal.log").unlink()
    assert quick.forge(root, "build", "--json", "--remote=off").code == 0
    assert (root / "rehearsal.log").read_text().count("step toy:a") > 1
    assert shared.differences(root) == []


@pytest.mark.parametrize("space", ["cas", "ac"])
def test_a_wrong_byte_on_a_remote_cache(root: Path, shared: Whole, quick: Quick, space: str) -> None:
    """All that lies there is wrong, so nothing is had from there: what was trained is trained again, the same."""
    for path in (root / "shared" / space).glob("*/*"):
        flip(path, path)
    shutil.rmtree(root / "cache")
    assert quick.forge(root, "build", "--json").code == 0
    assert shared.differences(root) == []


def test_a_wrong_byte_in_what_a_download_left(quick: Quick, tmp_path: Path) -> None:
    """Such a download goes on, is seen to be another file at its end, and begins anew."""
    data = bytes(range(256)) * 500
    sha256 = hashlib.sha256(data).hexdigest()
    (tmp_path / "recipes").mkdir()
    with serving(Host(files={"/a.safetensors": data})) as host:
        row = f'[source.a]\nfrom = "{host.url}/a.safetensors"\nsha256 = "{sha256}"\n'
        (tmp_path / "forge.toml").write_text(row)
        host.faults = ["cut", "404"]
        assert quick.forge(tmp_path, "fetch").code != 0
        (part,) = (tmp_path / "cache/v1/fetched/parts").iterdir()
        flip(part, part)
        assert quick.forge(tmp_path, "fetch").code == 0
    (got,) = (tmp_path / "cache/v1/fetched" / sha256).glob("a*")
    assert got.read_bytes() == data
