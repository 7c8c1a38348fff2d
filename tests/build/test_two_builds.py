"""Builds of one preset at once, by several processes: they share the work, and none takes the other for a stranger."""

from __future__ import annotations

from pathlib import Path

from tests.quick import Quick
from tests.survival import RECIPE, Whole, leftovers

BUILDERS = 3


def test_builds_of_one_preset_at_once_move_nothing_aside(whole: Whole, quick: Quick, tmp_path: Path) -> None:
    root = whole.clone(tmp_path / "project")
    for steps in (6, 7):  # what lies in out/ in the second round is what a build wrote in the first
        (root / "recipes" / "toy.toml").write_text(RECIPE.replace("steps = 6", f"steps = {steps}"))
        ran = [running.wait() for running in [quick.start(root, "build", "--json") for _ in range(BUILDERS)]]
        assert [each.code for each in ran] == [0] * BUILDERS, ran
        assert sorted(p.name for p in (root / "out").iterdir()) == [".written", "toy"]
        assert leftovers(root) == []
        assert quick.forge(root, "build", "--json").built == []
    starts = [line for line in (root / "rehearsal.log").read_text().splitlines() if line.startswith("start")]
    assert len(starts) == 2


def test_what_a_person_put_there_meanwhile_is_kept(whole: Whole, quick: Quick, tmp_path: Path) -> None:
    root = whole.clone(tmp_path / "project")
    report = root / "out" / "toy" / "report.html"
    report.parent.mkdir(parents=True)
    report.write_text("mine")
    ran = [running.wait() for running in [quick.start(root, "build", "--json") for _ in range(BUILDERS)]]
    assert [each.code for each in ran] == [0] * BUILDERS, ran
    assert [p.name for p in (root / "out" / ".replaced").rglob("*") if p.is_file()] == ["report.html"]
    assert (root / "out" / ".replaced" / "toy" / "report.html").read_text() == "mine"


def test_what_was_moved_aside_stays_when_more_follows(whole: Whole, quick: Quick, tmp_path: Path) -> None:
    root = whole.copy(tmp_path / "project")
    output = root / "out" / "toy" / "toy.safetensors"
    for mine in ("first", "second", "third"):
        output.unlink()
        output.write_text(mine)
        assert quick.forge(root, "build", "--json").code == 0
    aside = sorted((root / "out" / ".replaced" / "toy").glob("toy.safetensors*"))
    assert [path.read_text() for path in aside] == ["first", "second", "third"]
    assert whole.differences(root) == []
