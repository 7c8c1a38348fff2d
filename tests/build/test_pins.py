"""Trained results are pinned: every row and column of the table that says what is done with a pin (DESIGN §4.4)."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Project, new_project

pytestmark = pytest.mark.usefixtures("forked")

RECIPE = """\
family = "sd15"

[rehearsal.a]
on = "base"
dataset = "drawings"

[halves.soft]
first = "base"
second = "a"

[preset]
checkpoint = "a"
"""


@dataclass
class Machines:
    """A project as one machine built it, and D, what it pinned; D1 is what the same key comes out as elsewhere."""

    here: Project
    pinned: str
    elsewhere: str


def pins(project: Project) -> list[str]:
    """Digests of the results that the lock pins."""
    return re.findall(r"^\[result\.\w+\.(\w+)\]", project.lock, re.MULTILINE)


def results(project: Project, target: str) -> dict[Path, dict[str, Any]]:
    """What the store has of a target."""
    found = {path: json.loads(path.read_bytes()) for path in (project.root / "cache/v1/results").rglob("*.json")}
    return {path: result for path, result in found.items() if result["record"].get("target") == target}


def kept(project: Project) -> set[str]:
    """Digests of a's results in the store."""
    return {result["digest"] for result in results(project, "toy:a").values()}


def objects(project: Project, target: str) -> list[Path]:
    """Files of the store in which bytes lie that a target made (and not what it was made from)."""
    (result,) = results(project, target).values()
    before = [each["packs"] for each in results(project, "toy:a").values() if target != "toy:a"]
    packs = set(result["packs"]) - {pack for row in before for pack in row}
    return [path for pack in packs if (path := project.root / "cache/v1/objects" / pack[:2] / pack).exists()]


def damage(project: Project, target: str) -> None:
    """Turn a bit of what a target made."""
    (path,) = objects(project, target)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def forget(project: Project, target: str) -> None:
    """Remove what the store has of a target, as `clean` would."""
    for path in [*objects(project, target), *results(project, target)]:
        path.unlink()
    for index in (project.root / "cache/v1").glob("index.db*"):
        index.unlink()


def two_threads(project: Project) -> None:
    """Make a machine on which trainings come out a little differently."""
    (project.root / "forge.local.toml").write_text("[run]\nthreads = 2\n")


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Path) -> Machines:
    project = new_project(tmp_path_factory.mktemp("pins") / "here", toy_checkpoint, RECIPE)
    assert project.build().built == ["a", "preset.export"]
    (pinned,) = pins(project)
    other = project.clone(project.root.with_name("there"))
    two_threads(other)
    other.build()
    (elsewhere,) = kept(other)
    assert elsewhere != pinned
    return Machines(project, pinned, elsewhere)


@pytest.fixture
def here(machines: Machines, tmp_path: Path) -> Project:
    """Pinned D, in the store."""
    shutil.copytree(machines.here.root, tmp_path / "here")
    project = Project(tmp_path / "here")
    project.trained()
    return project


@pytest.fixture
def fresh(machines: Machines, tmp_path: Path) -> Project:
    """Pinned D, nothing here."""
    return machines.here.clone(tmp_path / "fresh")


@pytest.fixture
def there(machines: Machines, tmp_path: Path) -> Project:
    """Pinned D, and the store has only D1."""
    shutil.copytree(machines.here.root.with_name("there"), tmp_path / "there")
    project = Project(tmp_path / "there")
    project.trained()
    return project


# -- pinned D, in the store --------------------------------------------------------------------------------------------


def test_pinned_and_here_is_reused(here: Project) -> None:
    before = here.lock
    assert here.build().built == here.build("--locked").built == here.trained() == []
    assert here.lock == before


def test_pinned_and_here_retrained_replaces_the_pin_and_keeps_the_result(here: Project, machines: Machines) -> None:
    two_threads(here)
    assert "a" in here.build("--retrain", "a").built
    assert here.starts() == ["a"]
    assert pins(here) == [machines.elsewhere]
    assert kept(here) == {machines.pinned, machines.elsewhere}
    assert here.build().built == here.build("--locked").built == []


# -- pinned D, the store has only D1 -----------------------------------------------------------------------------------


def test_another_result_is_reused_and_said_to_differ(there: Project) -> None:
    before = there.lock
    assert "differs from the pin" in there.forge("plan").out
    assert "differs from the pin" in there.forge("build").out  # which has nothing to do
    shutil.rmtree(there.root / "out")
    assert "differs from its pin" in there.forge("build").out
    ran = there.build()
    assert ran.built == there.trained() == []
    assert there.lock == before


def test_another_result_is_refused_under_locked(there: Project, machines: Machines) -> None:
    ran = there.forge("build", "--locked", code=3)
    assert machines.pinned[:8] in ran.err
    assert there.trained() == []


def test_another_result_retrained_replaces_the_pin(there: Project, machines: Machines) -> None:
    there.build("--retrain", "a")
    assert there.starts() == ["a"]
    assert pins(there) == [machines.elsewhere]
    assert there.build("--locked").built == []


# -- pinned D, nothing here --------------------------------------------------------------------------------------------


def test_a_second_clone_trains_and_says_that_it_equals_the_pin(fresh: Project) -> None:
    before = fresh.lock
    assert "the pinned result is not to be had" in fresh.forge("plan").out
    ran = fresh.build()
    assert fresh.starts() == ["a"]
    assert [event["equal"] for event in ran.of("pin")] == [True]
    assert fresh.lock == before


def test_a_third_clone_with_two_threads_differs_and_says_how_far_and_why(fresh: Project) -> None:
    before = fresh.lock
    two_threads(fresh)
    ran = fresh.build()
    assert fresh.starts() == ["a"]
    (pin,) = ran.of("pin")
    assert pin["equal"] is False
    assert pin["fingerprint"] == {"threads": [1, 2]}
    assert 0 < pin["distance"] < 0.1
    assert "what follows from it differs too" in pin["text"]
    assert fresh.lock == before


def test_nothing_here_is_refused_under_locked(fresh: Project) -> None:
    ran = fresh.forge("build", "--locked", code=3)
    assert "pinned" in ran.err
    assert fresh.trained() == []


def test_nothing_here_retrained_replaces_the_pin(fresh: Project, machines: Machines) -> None:
    two_threads(fresh)
    fresh.build("--retrain", "a")
    assert fresh.starts() == ["a"]
    assert pins(fresh) == [machines.elsewhere]


# -- not pinned --------------------------------------------------------------------------------------------------------


def test_unpinned_and_here_is_reused_and_pinned(here: Project, machines: Machines) -> None:
    before = here.lock
    (here.root / "forge.lock").unlink()
    assert here.build().built == here.trained() == []
    assert here.lock == before
    assert pins(here) == [machines.pinned]


def test_of_several_unpinned_results_the_first_made_is_taken(here: Project, machines: Machines) -> None:
    two_threads(here)
    here.build("--retrain", "a")
    (here.root / "forge.lock").unlink()
    here.build()
    assert pins(here) == [machines.pinned]


@pytest.mark.parametrize("stored", [True, False], ids=["in the store", "nowhere"])
def test_unpinned_is_refused_under_locked(here: Project, fresh: Project, stored: bool) -> None:
    project = here if stored else fresh
    (project.root / "forge.lock").unlink()
    ran = project.forge("build", "--locked", code=3)
    assert "lock" in ran.err
    assert project.trained() == []
    assert not (project.root / "forge.lock").exists()


def test_unpinned_and_nowhere_is_trained_and_pinned(fresh: Project, machines: Machines) -> None:
    (fresh.root / "forge.lock").unlink()
    fresh.build()
    assert fresh.starts() == ["a"]
    assert pins(fresh) == [machines.pinned]


@pytest.mark.parametrize("stored", [True, False], ids=["in the store", "nowhere"])
def test_unpinned_retrained_is_trained_and_pinned(
    here: Project, fresh: Project, machines: Machines, stored: bool
) -> None:
    project = here if stored else fresh
    (project.root / "forge.lock").unlink()
    two_threads(project)
    project.build("--retrain", "a")
    assert project.starts() == ["a"]
    assert pins(project) == [machines.elsewhere]


# -- D in the store is damaged -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("locked", [[], ["--locked"]], ids=["build", "locked"])
def test_a_damaged_pinned_result_is_set_aside_and_not_made_again(here: Project, locked: list[str]) -> None:
    damage(here, "toy:a")
    here.output.unlink()
    ran = here.forge("build", *locked, code=3)
    assert "--retrain" in ran.out + ran.err
    assert any((here.root / "cache/v1/quarantine").iterdir())
    assert here.trained() == []
    if locked:
        assert here.forge("build", *locked, code=3).code == 3


def test_a_damaged_pinned_result_is_made_again_with_retrain(here: Project, machines: Machines) -> None:
    damage(here, "toy:a")
    before = here.output.read_bytes()
    here.output.unlink()
    here.forge("build", code=3)
    here.build("--retrain", "a")
    assert here.starts() == ["a"]
    assert pins(here) == [machines.pinned]
    assert here.output.read_bytes() == before


def test_a_damaged_merge_is_made_again(here: Project) -> None:
    here.build("soft")
    damage(here, "toy:soft")
    here.edit('checkpoint = "a"', 'checkpoint = "soft"')
    ran = here.build()
    assert ran.built == ["soft", "preset.export"]
    assert here.trained() == []


# -- two digests for one key -------------------------------------------------------------------------------------------


@pytest.fixture
def torn(here: Project, machines: Machines) -> Project:
    """What a merge in git leaves when two machines have pinned the same key."""
    table = here.lock[here.lock.index("[result.") :]
    (here.root / "forge.lock").write_text(here.lock + "\n" + table.replace(machines.pinned, machines.elsewhere))
    return here


@pytest.mark.parametrize("locked", [[], ["--locked"]], ids=["build", "locked"])
def test_two_pins_of_one_key_are_refused_and_named(torn: Project, machines: Machines, locked: list[str]) -> None:
    ran = torn.forge("build", *locked, code=3)
    assert machines.pinned[:12] in ran.err
    assert machines.elsewhere[:12] in ran.err
    assert "forge lock --take" in ran.err


def test_one_of_two_pins_is_taken(torn: Project, machines: Machines) -> None:
    torn.forge("lock", "--take", machines.pinned[:12])
    assert pins(torn) == [machines.pinned]
    assert torn.build().built == []


def test_retraining_replaces_both_pins(torn: Project, machines: Machines) -> None:
    torn.build("--retrain", "a")
    assert torn.starts() == ["a"]
    assert pins(torn) == [machines.pinned]


# -- a formula that does not come out as it is pinned ------------------------------------------------------------------


@pytest.mark.parametrize("how", [[], ["--locked"], ["--retrain", "a"]], ids=["build", "locked", "retrain"])
def test_a_merge_that_comes_out_differently_is_refused_in_every_mode(here: Project, how: list[str]) -> None:
    here.build("soft")
    table = re.search(r'\[target\."toy:soft"\]\ncomponents = .*\ndigest = "(\w+)"', here.lock)
    assert table
    lock = re.sub(r'unet = "\w{16}"', f'unet = "{"0" * 16}"', here.lock.replace(table[1], "0" * 64))
    (here.root / "forge.lock").write_text(lock)
    forget(here, "toy:soft")
    ran = here.forge("build", "soft", *how, code=3)
    assert f"the lock says {'0' * 12} for the same inputs: unet\n" in ran.out + ran.err
    assert not results(here, "toy:soft")


# -- sources -----------------------------------------------------------------------------------------------------------


def test_an_undeclared_source_that_changed_is_pinned_anew_and_said_so(here: Project) -> None:
    before = here.lock
    path = here.root / "drawings" / "0.txt"
    path.write_text("another caption\n")
    assert "drawings" in here.forge("build").out
    assert here.lock != before


def test_files_of_a_source_that_is_the_same_are_noted_without_a_word(here: Project) -> None:
    (here.root / "base" / "README.md").write_text("A toy.\n")
    config = here.root / "base" / "unet" / "config.json"
    before = config.read_bytes(), here.lock
    config.write_text(json.dumps(json.loads(before[0]), indent=1))
    assert config.read_bytes() != before[0]
    assert "pinned anew" not in here.forge("build").out
    assert here.lock != before[1]
    assert here.trained() == []


def test_an_undeclared_source_that_changed_is_refused_under_locked(here: Project) -> None:
    (here.root / "drawings" / "0.txt").write_text("another caption\n")
    ran = here.forge("build", "--locked", code=3)
    assert "drawings" in ran.err
    assert here.trained() == []


def test_a_declared_source_that_changed_is_refused_always(here: Project) -> None:
    import hashlib

    single = here.root / "single.safetensors"
    shutil.copyfile(here.output, single)
    digest = hashlib.sha256(single.read_bytes()).hexdigest()
    here.edit('from = "base"', f'from = "single.safetensors"\nsha256 = "{digest}"', "forge.toml")
    here.build()
    data = bytearray(single.read_bytes())
    data[-1] ^= 1
    single.write_bytes(data)
    ran = here.forge("build", code=3)
    assert digest[:12] in ran.err


def test_the_lock_says_what_a_target_is_now_though_the_result_differs(there: Project, machines: Machines) -> None:
    there.edit('dataset = "drawings"', 'dataset = "drawings"\nrank = 4')
    there.build("a")
    assert f'[target."toy:a"]\ndigest = "{machines.pinned}"' not in there.lock
    there.edit("\nrank = 4", "")
    there.build("a")
    assert f'[target."toy:a"]\ndigest = "{machines.pinned}"' in there.lock


# -- D's record is in the store, its bytes are not ---------------------------------------------------------------------


def test_a_pinned_result_without_its_bytes_is_trained_once_where_it_comes_out_differently(
    here: Project, machines: Machines
) -> None:
    (pack,) = objects(here, "toy:a")
    pack.unlink()
    here.output.unlink()
    shutil.rmtree(here.root / "cache/v1/states")
    two_threads(here)
    ran = here.build()
    assert here.starts() == ["a"]
    assert kept(here) == {machines.pinned, machines.elsewhere}
    assert [event["equal"] for event in ran.of("pin")] == [False]
    assert pins(here) == [machines.pinned]
    assert here.build().built == here.trained() == []
    assert "not to be had, only another one" in here.forge("build", "--locked", code=3).err


def test_of_several_unpinned_results_one_whose_bytes_are_here_is_taken(here: Project, machines: Machines) -> None:
    two_threads(here)
    (pack,) = objects(here, "toy:a")
    here.build("--retrain", "a")
    (here.root / "forge.lock").unlink()
    pack.unlink()
    here.trained()
    here.build()
    assert here.trained() == []
    assert pins(here) == [machines.elsewhere]
