"""Every build of a preset tells of it: report, card, and what other programs read beside its files."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from sdforge.cli import main
from sdforge.telling import TEXTS, is_told, tell
from tests.build.inline import Bench

SCRIPT = "<script>alert(1)</script>"
RECIPE = f"""
description = "Drawings of toys"

[weighted_sum.soft]
checkpoints = ["base", "ink"]
weights = [0.5, 0.5]

[preset]
checkpoint = "soft"
insert = ["word"]
bake = {{ glow = 0.5 }}
export = ["checkpoint", "embeddings"]
negative_prompt = "blurry"
clip_skip = 0
licence = "CC0-1.0"
trigger = ["toyword"]

[preset.previews]
prompts = ["{SCRIPT}", "a drawing"]
seeds = [1]
steps = 1
"""


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory, bench_files: Path) -> Bench:
    """A preset that was built, and built again at another strength. Read only."""
    root = tmp_path_factory.mktemp("told") / "project"
    shutil.copytree(bench_files, root)
    bench = Bench(root)
    bench.recipe(RECIPE)
    bench.build()
    (root / "first.html").write_text(page(bench), encoding="utf-8")
    bench.recipe(RECIPE.replace("glow = 0.5", "glow = 0.7"))
    bench.build()
    return bench


def page(bench: Bench) -> str:
    return (bench.root / "out" / "r" / "report.html").read_text(encoding="utf-8")


def picture(path: Path, alt: str) -> str:
    """Return the one picture of a page that says this."""
    (found,) = re.findall(rf'<img src="([^"]+)" alt="{alt}"', path.read_text(encoding="utf-8"))
    return str(found)


def described(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bench.root / "out" / "r" / "preset.json").read_text())
    return found


def test_a_build_writes_what_it_tells(twice: Bench) -> None:
    assert all((twice.root / "out" / "r" / name).stat().st_size for name in TEXTS)
    assert "Drawings of toys" in page(twice)
    assert SCRIPT not in page(twice)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page(twice)


def test_the_second_build_is_shown_beside_the_first(twice: Bench) -> None:
    first, now = (twice.root / "first.html").read_text(encoding="utf-8"), page(twice)
    assert "There is no earlier build to compare with yet." in first
    assert "build before" not in first
    assert now.count('alt="build before: a drawing, seed 1"') == 1
    assert "strength 0.5 → 0.7" in now
    assert "<del><i>−</i>bake = { glow = 0.5 }</del>" in now
    assert "<ins><i>+</i>bake = { glow = 0.7 }</ins>" in now


def test_what_is_shown_of_the_first_build_is_what_it_drew(twice: Bench) -> None:
    first = picture(twice.root / "first.html", "r: a drawing, seed 1")
    assert picture(twice.root / "out/r/report.html", "build before: a drawing, seed 1") == first


def test_a_build_that_makes_the_same_is_no_other_build(twice: Bench) -> None:
    session = twice.session()
    before, text = session.chronicle.past("r").builds, page(twice)
    session.store.close()
    twice.build()
    session = twice.session()
    assert session.chronicle.past("r").builds == before
    assert len(before) == 2
    assert page(twice) == text
    session.store.close()


def test_what_lies_beside_a_model_is_listed_and_is_what_it_is_listed_as(twice: Bench) -> None:
    files = {row["path"]: row for row in described(twice)["files"]}
    wanted = {f"{stem}{ending}" for stem in ("r", "embeddings/word") for ending in (".json", ".preview.png")}
    assert wanted <= files.keys()
    for name in wanted:
        data = (twice.root / "out" / "r" / name).read_bytes()
        assert files[name]["sha256"] == hashlib.sha256(data).hexdigest()
        assert files[name]["of"] == f"{name.removesuffix('.json').removesuffix('.preview.png')}.safetensors"


def test_a1111_finds_words_and_advice_where_it_reads_them(twice: Bench) -> None:
    folder = twice.root / "out" / "r"
    own, word = (json.loads((folder / name).read_text()) for name in ("r.json", "embeddings/word.json"))
    assert own["sd version"] == "SD1"
    assert own["activation text"] == "toyword"
    assert own["negative text"] == "blurry"
    assert "steps 1" in own["notes"]
    assert "licence CC0-1.0" in own["notes"]
    assert word["activation text"] == "word"  # it calls an embedding by its file


def test_a_report_that_is_gone_is_written_by_the_next_build(twice: Bench) -> None:
    path = twice.root / "out" / "r" / "report.html"
    text = page(twice)
    path.unlink()
    session = twice.session()
    plan = session.plan(session.resolve(["r"]))
    assert plan.to_do == []
    assert not is_told(session, plan)
    session.store.close()
    summary = twice.build()
    assert (summary.built, summary.restored) == ([], [])
    assert page(twice) == text


def test_what_is_there_is_told_where_no_index_can_be_kept(twice: Bench, tmp_path: Path) -> None:
    bench = Bench(shutil.copytree(twice.root, tmp_path / "project"))
    for path in (bench.root / "cache" / "v1").glob("index.db*"):
        path.unlink()
    (bench.root / "cache" / "v1" / "index.db").mkdir()
    bench.build()
    assert "There is no earlier build to compare with yet." in page(bench)


def test_a_report_that_somebody_changed_is_kept_aside(twice: Bench) -> None:
    path = twice.root / "out" / "r" / "card.md"
    path.write_text("mine")
    session = twice.session()
    moved = tell(session, session.plan(session.resolve(["r"])), "r")
    session.store.close()
    assert [Path(name).name.partition(".")[0] for name in moved] == ["card"]
    assert (twice.root / moved[0]).read_text() == "mine"
    assert path.read_text() != "mine"


def test_clean_keeps_the_pictures_to_compare_with(twice: Bench) -> None:
    with chdir(twice.root):
        assert main(["clean"]) == 0
        assert main(["report", "r"]) == 0
    assert "build before" in page(twice)


def test_forge_report_says_where_it_is(twice: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-C", str(twice.root), "report", "r"]) == 0
    assert capsys.readouterr().out == "out/r/report.html\n"
    assert main(["-C", str(twice.root), "report", "r", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"v": 1, "event": "report", "path": "out/r/report.html"}


def test_forge_report_of_what_is_no_preset_or_not_built_says_so(
    twice: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    twice.recipe('[weighted_sum.w]\ncheckpoints = ["base"]\nweights = [1.0]\n', "merge")
    twice.recipe(RECIPE.replace("glow = 0.5", "glow = 0.9"), "other")
    assert main(["-C", str(twice.root), "report", "merge"]) == 2
    assert "merge is no preset" in capsys.readouterr().err
    assert main(["-C", str(twice.root), "report", "other"]) == 2
    assert "forge build other" in capsys.readouterr().err


def test_an_input_under_a_stricter_licence_is_a_warning(twice: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    toml = twice.root / "forge.toml"
    text = toml.read_text()
    toml.write_text(text.replace('from = "ink"', 'from = "ink"\nlicence = "cc-by-nc-4.0"'))
    try:
        assert main(["-C", str(twice.root), "check", "r"]) == 0
        said = capsys.readouterr().err
        assert "warning[licence]: `ink` is under CC-BY-NC-4.0: it forbids commercial use" in said
        assert 'licence = "CC0-1.0"' in said
        assert main(["-C", str(twice.root), "plan", "r"]) == 0
        assert "note: `ink` is under CC-BY-NC-4.0" in capsys.readouterr().out
    finally:
        toml.write_text(text)
