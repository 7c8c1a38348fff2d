"""Two projects that have only git content and a remote cache in common; the second computes with two threads.

Merges, the cast and the export are made again, byte for byte; the training, which two threads would make into another
one, comes from the remote cache. With nothing there it is trained and said to differ; a wrong byte there is not taken.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Ran
from tests.quick import Quick
from tests.survival import Whole, flip

RECIPE = """\
family = "sd15"

[weighted_sum.soft]
checkpoints = ["base", "ink"]
weights = [0.6, 0.4]
blocks = { "unet.mid" = [0.5, 0.5] }

[rehearsal.a]
on = "soft"
dataset = "drawings"
steps = 6

[weighted_sum.end]
checkpoints = ["a", "ink"]
weights = [0.7, 0.3]

[preset]
checkpoint = "end"
dtype = "fp16"
"""
FORMULAS = ("toy:soft", "toy:end")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, bench_files: Path, quick: Quick) -> Whole:
    place = tmp_path_factory.mktemp("two machines")
    root = place / "first"
    shutil.copytree(bench_files, root)
    (root / "recipes").mkdir()
    (root / "recipes" / "toy.toml").write_text(RECIPE)
    with (root / "forge.toml").open("a") as file:
        file.write(f'\n[remote]\naddress = "{place / "shared"}"\n')
    ran = quick.forge(root, "build", "toy", "--remote=write")
    assert ran.code == 0, ran.out + ran.err
    return Whole(root)


@pytest.fixture
def shared(first: Whole, tmp_path: Path) -> Path:
    """What lies on the remote cache, for this test alone."""
    shutil.copytree(first.root.with_name("shared"), tmp_path / "shared")
    return tmp_path / "shared"


@pytest.fixture
def second(first: Whole, shared: Path, tmp_path: Path) -> Path:
    root = first.clone(tmp_path / "second")
    shutil.copy(first.root / "forge.lock", root)
    text = (root / "forge.toml").read_text()
    (root / "forge.toml").write_text(text.replace(str(first.root.with_name("shared")), str(shared)))
    (root / "forge.local.toml").write_text("[run]\nthreads = 2\n")
    return root


def build(quick: Quick, root: Path, *arguments: str) -> Ran:
    return quick.forge(root, "build", "toy", *arguments, OMP_NUM_THREADS="2")


def made(root: Path) -> dict[str, list[str]]:
    """Return the packs of what formulas made, by target: files that their sha256 names."""
    values = [json.loads(path.read_bytes()) for path in (root / "cache/v1/results").glob("*/*/*.json")]
    return {v["record"]["target"]: sorted(v["packs"]) for v in values if v["record"].get("target") in FORMULAS}


def test_the_second_makes_every_formula_alike_and_fetches_the_rest(first: Whole, second: Path, quick: Quick) -> None:
    ran = build(quick, second)
    assert ran.code == 0, ran.out + ran.err
    assert not (second / "rehearsal.log").exists()
    assert first.differences(second) == []
    assert made(second) == {name: packs for name, packs in made(first.root).items() if name in made(second)}


def test_with_an_empty_remote_it_trains_and_says_that_the_result_differs(
    first: Whole, second: Path, shared: Path, quick: Quick
) -> None:
    shutil.rmtree(shared)
    assert build(quick, second, "--locked").code == 3
    ran = build(quick, second)
    assert ran.code == 0, ran.out + ran.err
    assert (second / "rehearsal.log").is_file()
    assert "differs from its pin" in ran.out
    assert (second / "forge.lock").read_bytes() == first.lock
    assert made(second)["toy:soft"] == made(first.root)["toy:soft"]


def test_with_a_wrong_byte_in_any_file_there_nothing_wrong_is_taken(
    first: Whole, second: Path, shared: Path, quick: Quick
) -> None:
    files = sorted(path for path in shared.glob("*/*/*") if path.is_file())
    assert len(files) == 6  # action, description, manifest, table, pack, losses
    for path in files:
        before = path.read_bytes()
        flip(path, path)
        ran = build(quick, second, "--locked")
        assert ran.code == 3, ran.out + ran.err
        assert not (second / "out").exists()
        path.write_bytes(before)
    assert not (second / "rehearsal.log").exists()
    assert build(quick, second, "--locked").code == 0
    assert first.differences(second) == []
