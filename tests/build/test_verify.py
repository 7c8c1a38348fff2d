"""`forge verify` sees every damage, names it, and leaves a cache that the next build mends."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from sdforge.index import Index
from tests.quick import Quick
from tests.survival import RECIPE, Whole, damages, entries, flip, leftovers


@pytest.fixture
def root(whole: Whole, tmp_path: Path) -> Path:
    return whole.copy(tmp_path / "project")


def pack_of_a(root: Path) -> Path:
    """The pack of the trained result."""
    (record,) = (p for p in (root / "cache/v1/results").glob("*/*/*.json") if '"target": "toy:a"' in p.read_text())
    (name,) = json.loads(record.read_bytes())["packs"]
    return root / "cache/v1/objects" / name[:2] / name


def test_a_whole_cache_is_said_to_be_whole(root: Path, quick: Quick) -> None:
    ran = quick.forge(root, "verify")
    assert (ran.code, ran.err) == (0, "")
    assert "all is as it was written" in ran.out
    assert quick.forge(root, "verify", "toy:a").code == 0


ENTRIES = 18  # that the cache has beside its index
DAMAGES = [name for name in damages() if name not in ("remove",)]


def test_the_cache_has_as_many_entries_as_this_file_thinks(whole: Whole) -> None:
    assert [kind for kind, _, _ in entries(whole.root / "cache")].index("index") == ENTRIES


@pytest.mark.parametrize("number", range(ENTRIES))
def test_a_damaged_entry_is_named_and_mended(root: Path, whole: Whole, quick: Quick, number: int) -> None:
    """Every entry, each with another damage; `benchmarks/reliability.py` does all to all."""
    kind, path, other = list(entries(root / "cache"))[number]
    damages()[DAMAGES[number % len(DAMAGES)]](path, other)
    ran = quick.forge(root, "verify", "--json")
    assert ran.code == 3, ran.out
    named = [row["path"] for row in ran.of("damaged")]
    assert any(path.stem in name for name in named), (kind, path, named)
    shutil.rmtree(root / "out")
    assert quick.forge(root, "verify", "--json").code == 0  # what is damaged has been set aside
    assert quick.forge(root, "build", "--json").code == 0
    assert whole.differences(root) == []
    assert leftovers(root) == []


@pytest.mark.parametrize("number", range(ENTRIES + 1))
def test_a_build_never_uses_a_damaged_entry(root: Path, whole: Whole, quick: Quick, number: int) -> None:
    """The same without `verify`: the build finds it, and mends it or says which pinned result is lost."""
    _, path, other = list(entries(root / "cache"))[number]
    damages()[list(damages())[(number + 5) % len(damages())]](path, other)
    shutil.rmtree(root / "out")
    ran = quick.forge(root, "build", "--json")
    assert ran.code == 0 or (ran.code == 3 and "--retrain" in ran.out), ran.out
    assert quick.forge(root, "build", "--json").code == 0
    assert whole.differences(root) == []


def test_a_lost_training_is_called_by_its_name(root: Path, quick: Quick) -> None:
    flip(pack_of_a(root), root)
    ran = quick.forge(root, "verify")
    assert ran.code == 3
    assert "its bytes are not what its name says" in ran.out
    assert "with it toy:a is lost" in ran.out
    assert "quarantine/" in ran.out


def test_a_pack_that_is_gone_is_missed(root: Path, quick: Quick) -> None:
    pack_of_a(root).unlink()
    ran = quick.forge(root, "verify", "--json", "toy")
    assert ran.code == 3
    assert [(row["reason"], row["lost"]) for row in ran.of("damaged")] == [("it is not there", ["toy:a"])]


def test_a_changed_output_is_named_and_left_alone(root: Path, quick: Quick) -> None:
    path = root / "out" / "toy" / "toy.safetensors"
    flip(path, path)
    before = path.read_bytes()
    ran = quick.forge(root, "verify", "--json")
    assert ran.code == 3
    assert [row["path"] for row in ran.of("damaged")] == ["out/toy/toy.safetensors"]
    assert path.read_bytes() == before


def test_a_source_whose_bytes_change_behind_its_times_is_named(root: Path, quick: Quick) -> None:
    """What a failing disk does; an edit would change the times. The memory of the look is made wrong instead."""
    place = str(root / "drawings" / "0.png")
    index = Index(root / "cache/v1/index.db")
    index.put("seen", {f"file:{place}": (json.dumps(list(_stat(place))), 1, "0" * 64)})
    index.close()
    ran = quick.forge(root, "verify", "--json")
    assert ran.code == 3
    assert [row["path"] for row in ran.of("damaged")] == ["drawings/0.png"]


def _stat(place: str) -> tuple[int, int, int, int, int]:
    s = os.stat(place)  # noqa: PTH116
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


def test_a_recipe_with_a_mistake_does_not_keep_the_cache_from_being_verified(root: Path, quick: Quick) -> None:
    (root / "recipes" / "broken.toml").write_text("family =")
    assert quick.forge(root, "verify").code == 0


# -- made again --------------------------------------------------------------------------------------------------------


def test_a_target_that_is_made_again_is_equal_and_nothing_is_touched(root: Path, whole: Whole, quick: Quick) -> None:
    quick.forge(root, "build")
    files = sorted(str(p) for p in root.rglob("*") if p.is_file() and "index.db" not in p.name)
    ran = quick.forge(root, "verify", "--rebuild", "toy", "--json")
    assert ran.code == 0, ran.out
    assert [(row["target"], row["equal"]) for row in ran.of("compared")] == [
        ("toy:a", True),
        ("toy:preset.export", True),
    ]
    assert whole.differences(root) == []
    assert leftovers(root) == []
    log = str(root / "rehearsal.log")
    assert [f for f in sorted(str(p) for p in root.rglob("*") if p.is_file()) if "index.db" not in f] == [
        *sorted({*files, log})
    ]


def test_another_fingerprint_is_told_by_its_distance_and_the_first_tensor(root: Path, quick: Quick) -> None:
    with (root / "forge.toml").open("a") as file:
        file.write("\n[run]\nthreads = 2\n")
    ran = quick.forge(root, "verify", "--rebuild", "toy", "--json")
    first, export = ran.of("compared")
    assert ran.code == 0, ran.out  # trained elsewhere: that it differs is no broken promise
    assert first["first"].startswith("text_encoder.")
    assert (first["equal"], first["promised"], first["count"]) == (False, False, 1)
    assert 0 < first["distance"] < 0.1
    assert export["follows"] == "a"
    said = quick.forge(root, "verify", "--rebuild", "toy:a").out
    assert f"differs: {first['first']} is the first of 1; about {first['distance']:.2g} of its update away" in said


def test_other_bits_on_the_same_fingerprint_are_a_broken_promise(root: Path, quick: Quick) -> None:
    (folder,) = {p.parent for p in (root / "cache/v1/results").glob("*/*/*.json") if '"toy:a"' in p.read_text()}
    ran = quick.forge(root, "verify", "--rebuild", "toy:a", "--json", REHEARSAL_NOISE="1")
    assert folder.is_dir()
    assert ran.code == 3, ran.out
    assert ran.of("compared")[0]["first"].startswith("text_encoder.")


def test_what_was_never_built_cannot_be_compared(root: Path, quick: Quick) -> None:
    (root / "recipes" / "toy.toml").write_text(RECIPE.replace("steps = 6", "steps = 7"))
    ran = quick.forge(root, "verify", "--rebuild", "toy:a")
    assert ran.code == 2
    assert "has not been built" in ran.err
