"""`forge du`: the bytes are those of the disk, and each target is told apart from what it shares."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sdforge.cli import main
from sdforge.store import files
from tests.build.inline import Bench
from tests.build.test_single_tensors import MID, SOFT, variants


@pytest.fixture
def du(bench: Bench, capsys: pytest.CaptureFixture[str]) -> Any:
    def ask() -> dict[str, Any]:
        capsys.readouterr()
        assert main(["-C", str(bench.root), "du", "--json"]) == 0
        said: dict[str, Any] = json.loads(capsys.readouterr().out)
        return said

    return ask


def of_targets(said: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["target"]: row for row in said["owners"] if "target" in row}


def test_the_kinds_are_all_files_of_the_cache_and_their_bytes(bench: Bench, du: Any) -> None:
    bench.recipe(SOFT + '[preset]\ncheckpoint = "soft"\n')
    bench.build()
    said = du()
    files = [path for path in (bench.root / "cache" / "v1").rglob("*") if path.is_file()]
    assert said["bytes"] == sum(path.stat().st_size for path in files)
    assert said["files"] == len(files)
    assert sum(kind["bytes"] for kind in said["kinds"].values()) == said["bytes"]
    assert said["kinds"]["packs"] == {"files": 1, "bytes": sum(bench.packs().values())}
    assert said["kinds"]["left over"]["files"] == 0


def test_variants_share_a_base_and_add_little(bench: Bench, du: Any) -> None:
    bench.recipe(variants(3))
    bench.build()
    rows = of_targets(du())
    packs = sorted(bench.packs().values())
    assert all(row["bytes"] == row["shared"] + row["alone"] for row in rows.values())
    assert all(row["shared"] >= packs[-1] for row in rows.values())
    assert max(row["alone"] for row in rows.values()) < packs[-1]


def test_what_a_target_alone_adds_goes_when_it_does(bench: Bench, du: Any) -> None:
    """A recipe with one target fewer, and `clean`: the bytes that it alone added are gone."""
    bench.recipe(variants(3))
    bench.build()
    before, row = du(), of_targets(du())["v2"]
    bench.recipe(variants(2))
    bench.build()
    assert main(["-C", str(bench.root), "clean"]) == 0
    kinds = ("packs", "tables", "results")
    freed = sum(before["kinds"][kind]["bytes"] - du()["kinds"][kind]["bytes"] for kind in kinds)
    manifests = freed - row["alone"]
    assert -5000 < manifests <= 0  # `clean` keeps manifests, since `why` wants them


def test_a_recipe_is_what_its_targets_are_together(bench: Bench, du: Any) -> None:
    bench.recipe(variants(3))
    bench.recipe(SOFT, "other")
    bench.build("r", "other")
    said = du()
    recipes = {row["recipe"]: row for row in said["owners"] if "recipe" in row and "target" not in row}
    (project,) = (row for row in said["owners"] if "recipe" not in row)
    assert set(recipes) == {"r", "other"}
    assert recipes["r"]["shared"] == 0 < recipes["r"]["bytes"]
    assert project["bytes"] == recipes["r"]["bytes"] + recipes["other"]["bytes"]


def test_tensors_that_no_result_lists_any_more_are_told(bench: Bench, du: Any) -> None:
    bench.recipe(SOFT)
    bench.build()
    bench.recipe(SOFT + MID)
    bench.build()
    old = {name: len(bench.bytes_of("soft")[name]) for name in bench.computed("soft")}
    assert du()["unlisted"] == 0
    assert main(["-C", str(bench.root), "clean"]) == 0
    assert du()["unlisted"] == sum(old.values())


def test_what_passes_into_a_file_s_pack_is_needed_for_the_file(bench: Bench, du: Any) -> None:
    bench.recipe(SOFT + '[preset]\ncheckpoint = "soft"\nexport = ["checkpoint"]\n')
    bench.build()
    layout = bench.orders["r:soft"].layout
    assert layout is not None
    assert layout.passing
    assert du()["unlisted"] == 0


def test_a_person_reads_sizes_and_names(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.recipe(SOFT)
    bench.build()
    capsys.readouterr()
    assert main(["-C", str(bench.root), "du"]) == 0
    lines = capsys.readouterr().out.splitlines()
    total = sum(path.stat().st_size for path in (bench.root / "cache" / "v1").rglob("*") if path.is_file())
    assert any(f" {total} bytes in " in line for line in lines)
    assert any(line.split()[:2] == ["soft", "weighted_sum"] for line in lines)


def test_recipes_with_mistakes_are_named_and_the_kinds_are_told(bench: Bench, du: Any) -> None:
    bench.recipe("nonsense = 1\n", "wrong")
    said = du()
    assert list(said["unread"]) == [str(bench.root)]


SHIFTED = SOFT.replace("[0.6, 0.4]", "[0.5, 0.5]") + 'blocks = { "text_encoder" = [0.6, 0.4] }\n'


@pytest.fixture
def worn(bench: Bench) -> str:
    """A pack of which the text encoder alone is needed, after the U-Net's weights have changed."""
    bench.recipe(SOFT)
    bench.build()
    (pack,) = bench.packs()
    bench.recipe(SHIFTED)
    bench.build()
    return pack


@pytest.fixture
def clean(bench: Bench, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["-C", str(bench.root), "clean", "--json", *arguments]) == 0
        said: dict[str, Any] = json.loads(capsys.readouterr().out)
        return said

    return run


def test_a_pack_that_is_mostly_needed_by_nobody_shrinks_to_what_is(bench: Bench, worn: str, clean: Any) -> None:
    before, size = bench.bytes_of("soft"), bench.packs()[worn]
    needed = sum(len(data) for name, data in before.items() if name.startswith("text_encoder"))
    assert clean()["packs"] == 1
    assert worn not in bench.packs()
    assert any(needed < own < needed + size / 4 for own in bench.packs().values())
    assert bench.bytes_of("soft") == before
    assert bench.plan().to_do == []
    bench.recipe(SOFT)  # what is left of its pack is found in the new one
    bench.build()
    assert {name.partition(".")[0] for name in bench.computed("soft")} == {"unet"}


@pytest.mark.usefixtures("worn")
def test_what_shrinking_frees_is_said_before(clean: Any, du: Any) -> None:
    kinds = ("packs", "tables", "results", "left over")
    before, said = du()["kinds"], clean("--dry-run")
    assert all(du()["kinds"][kind] == before[kind] for kind in kinds)
    assert clean() == said | {"dry_run": False}
    now = du()
    assert said["bytes"] == sum(before[kind]["bytes"] - now["kinds"][kind]["bytes"] for kind in kinds)
    assert now["unlisted"] == 0
    assert clean() == said | {"dry_run": False, "files": 0, "packs": 0, "bytes": 0}


def test_a_damaged_pack_is_left_to_those_who_read_it(bench: Bench, worn: str, clean: Any) -> None:
    path = bench.root / "cache" / "v1" / "objects" / worn[:2] / worn
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1  # of the text encoder, whose names come first
    path.chmod(0o644)
    path.write_bytes(data)
    assert clean()["packs"] == 0
    assert worn in bench.packs()


@pytest.mark.parametrize("publish", [1, 2, 3])
def test_a_clean_that_the_disk_stops_loses_nothing(
    bench: Bench, worn: str, clean: Any, publish: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops at the new pack, at the table that lists it, and at the result that has the table."""
    before = bench.bytes_of("soft")
    with monkeypatch.context() as patch:
        patch.setenv(files.FAULT, f"ENOSPC:{publish}")
        patch.setattr(files, "_published", 0)
        assert main(["-C", str(bench.root), "clean"]) == 4
    assert bench.bytes_of("soft") == before
    assert clean()["packs"] == 1
    assert worn not in bench.packs()
    assert bench.bytes_of("soft") == before
