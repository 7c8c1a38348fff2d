"""`forge clean` frees what it says, and nothing that anybody may still want."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdforge.chronicle import Chronicle
from sdforge.cli import main
from sdforge.drawn import Pictures
from sdforge.lock import Lock, Pin
from sdforge.store import Store
from sdforge.store.entries import Result
from tests.store.conftest import make_result

Clean = Callable[..., dict[str, Any]]
MERGED, TRAINED, PINNED = "aa" * 32, "bb" * 32, "cc" * 32


@pytest.fixture
def clean(root: Path, capsys: pytest.CaptureFixture[str]) -> Clean:
    def run(*arguments: str, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["-C", str(root), "clean", "--json", *arguments]) == code
        said: dict[str, Any] = json.loads(capsys.readouterr().out)
        return said

    return run


@pytest.fixture
def filled(store: Store) -> dict[str, Result]:
    """A merge and a training that no recipe reaches."""
    found = {
        MERGED: make_result(store, MERGED, b"a merge" * 100, kind="checkpoint", grade="A"),
        TRAINED: make_result(store, TRAINED, b"a training" * 100),
    }
    store.close()
    return found


def kept(cache: Path) -> set[str]:
    return {p.parent.name for p in (cache / "v1" / "results").glob("*/*/*.json")}


def weight(cache: Path) -> int:
    """The bytes of all that is kept; the index is not part of it."""
    files = (p for p in (cache / "v1").rglob("*") if p.is_file() and not p.name.startswith("index.db"))
    return sum(p.stat().st_size for p in files if p.parent.name != "locks")


def test_what_no_recipe_reaches_goes(cache: Path, clean: Clean, filled: dict[str, Result]) -> None:
    clean()
    assert kept(cache) == {TRAINED}
    assert not Store(cache).object(filled[MERGED].packs[0]).exists()


def test_trained_results_stay_whole(cache: Path, clean: Clean, filled: dict[str, Result]) -> None:
    clean()
    store = Store(cache)
    (result,) = store.known(TRAINED).results
    assert store.holds(result)
    assert len(store.table(result.components["lora"])) == 1
    record = filled[TRAINED].record
    for sha256 in (record["log"], record["losses"], record["samples"][0][2]):
        assert store.read_object(sha256)


@pytest.mark.usefixtures("filled")
def test_trained_results_go_when_asked_for(cache: Path, clean: Clean) -> None:
    clean("--trained")
    assert kept(cache) == set()
    assert not [p for p in (cache / "v1" / "objects").rglob("*") if p.is_file()]


@pytest.mark.parametrize("arguments", [[], ["--trained"]])
@pytest.mark.usefixtures("filled")
def test_a_dry_run_says_what_is_freed_and_frees_nothing(cache: Path, clean: Clean, arguments: list[str]) -> None:
    states = Store(cache).states("dd" * 32)
    states.mkdir(parents=True)
    (states / "10.json").write_text("{}")
    (cache / "v1" / "quarantine").mkdir()
    (cache / "v1" / "quarantine" / "x").write_bytes(b"damaged")
    before = weight(cache)
    said = clean("--dry-run", *arguments)
    assert weight(cache) == before
    done = clean(*arguments)
    assert said["bytes"] == done["bytes"] == before - weight(cache) > 0
    assert said["files"] == done["files"]


@pytest.mark.usefixtures("filled")
def test_cleaning_twice_frees_nothing_more(clean: Clean) -> None:
    clean()
    assert clean()["bytes"] == 0


@pytest.mark.usefixtures("filled")
def test_train_states_stay_unless_asked_for(cache: Path, clean: Clean) -> None:
    states = Store(cache).states("dd" * 32)
    states.mkdir(parents=True)
    (states / "10.json").write_text("{}")
    clean()
    assert states.is_dir()
    clean("--trained")
    assert not states.exists()


def test_a_pack_that_somebody_else_needs_stays(cache: Path, store: Store, clean: Clean) -> None:
    make_result(store, MERGED, b"shared bytes", kind="checkpoint", grade="A")
    result = make_result(store, TRAINED, b"shared bytes")
    store.close()
    clean()
    assert Store(cache).object(result.packs[0]).exists()


def test_what_the_lock_pins_stays(root: Path, cache: Path, clean: Clean, store: Store) -> None:
    result = make_result(store, PINNED, b"a merge", kind="checkpoint", grade="A")
    store.close()
    lock = Lock()
    lock.pin(Pin(PINNED, result.digest), replace=True)
    (root / "forge.lock").write_text(lock.dump())
    clean("--trained")
    assert kept(cache) == {PINNED}


def test_what_a_check_compares_with_stays(root: Path, cache: Path, clean: Clean, store: Store) -> None:
    """Previews that passed, also where the reports of later builds show them no more."""
    make_result(store, MERGED, b"pictures", kind="pictures", grade="A")
    (root / "recipes").mkdir(exist_ok=True)
    (root / "recipes" / "r.toml").write_text('family = "sd15"\n')
    passed = Pictures(MERGED, "digest", "column")
    Chronicle(store.index, root, root / "out").change("r", lambda past: past.with_passed(passed, unchecked=False))
    store.close()
    clean()
    assert kept(cache) == {MERGED}


def test_what_another_project_pins_stays(tmp_path: Path, cache: Path, clean: Clean, store: Store) -> None:
    result = make_result(store, PINNED, b"a merge", kind="checkpoint", grade="A")
    other = tmp_path / "other"
    other.mkdir()
    (other / "forge.toml").write_text("")
    lock = Lock()
    lock.pin(Pin(PINNED, result.digest), replace=True)
    (other / "forge.lock").write_text(lock.dump())
    store.register(other)
    store.close()
    clean("--trained")
    assert kept(cache) == {PINNED}


def test_what_another_project_fetched_into_this_ones_own_cache_stays(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was built with FORGE_CACHE, which is not set any more."""
    monkeypatch.delenv("FORGE_CACHE")
    store, other = Store(root / "cache"), tmp_path / "other"
    other.mkdir()
    (other / "forge.toml").write_text(f'[source.x]\nfrom = "https://host/x.safetensors"\nsha256 = "{PINNED}"\n')
    store.prepare()
    store.register(other)
    for sha256 in (PINNED, MERGED):
        store.fetched("", sha256).mkdir(parents=True)
    assert main(["-C", str(root), "clean"]) == 0
    assert [path.name for path in (store.root / "fetched").iterdir()] == [PINNED]


def test_a_project_that_is_gone_keeps_nothing(tmp_path: Path, cache: Path, clean: Clean, store: Store) -> None:
    make_result(store, MERGED, b"a merge", kind="checkpoint", grade="A")
    store.register(tmp_path / "gone")
    store.close()
    clean()
    assert kept(cache) == set()


def test_a_recipe_that_cannot_be_read_stops_cleaning(
    root: Path, cache: Path, clean: Clean, filled: dict[str, Result]
) -> None:
    (root / "recipes" / "r.toml").write_text("family =")
    said = clean("--trained", code=2)
    assert "what they need is not known" in str(said["message"])
    assert kept(cache) == set(filled)


def test_cleaning_does_not_run_beside_a_build(cache: Path, clean: Clean, filled: dict[str, Result]) -> None:
    guard = Store(cache).guard()
    assert guard.share(wait=False)
    said = clean("--trained", code=5)
    assert said["message"] == "a build or a download is using the cache"
    assert kept(cache) == set(filled)
    guard.release()


def test_an_alias_that_leads_nowhere_goes(cache: Path, clean: Clean, store: Store) -> None:
    store.prepare()
    store.add_alias("dd" * 32, "ee" * 32)
    store.close()
    clean()
    assert Store(cache).known("dd" * 32).alias == ""


@pytest.mark.usefixtures("filled")
def test_the_index_forgets_what_went(cache: Path, clean: Clean) -> None:
    clean("--trained")
    store = Store(cache)
    assert store.known(MERGED).results == []
    assert store.known(TRAINED).results == []


def test_latents_that_nobody_used_for_long_go_and_others_stay(clean: Clean, store: Store) -> None:
    """They are made again where they lack, so their age decides, not --trained."""
    store.prepare()
    month = 31 * 86_400
    for name, age in (("old", month), ("new", 0)):
        path = store.derived() / "ab" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"latents")
        os.utime(path, (time.time() - age,) * 2)
        os.utime(path.parent, (time.time() - age,) * 2)
    store.close()
    assert clean()["files"] == 1
    assert [path.stem for path in store.derived().rglob("*.safetensors")] == ["new"]


@pytest.mark.parametrize("entry", [b"\xff\xfe", b"/another/project", b""])
def test_nothing_is_cleaned_while_it_is_not_known_for_whom(
    entry: bytes, cache: Path, clean: Clean, filled: dict[str, Result]
) -> None:
    root = cache / "v1" / "roots" / "0123456789abcdef"
    root.parent.mkdir(exist_ok=True)
    root.write_bytes(entry)
    said = clean(code=3)
    assert "0123456789abcdef was damaged" in said["message"]
    assert "build once in every project" in said["hint"]
    assert kept(cache) == set(filled)
    clean()
    assert kept(cache) == {TRAINED}
