"""A lone preset file is made again from the manifests in it, wherever its sources are at hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sdforge.cli import main
from sdforge.errors import UsageError
from sdforge.formats.pickled import write_pickle
from sdforge.formats.safetensors import read_header, write_file
from sdforge.rebuild import recipe_text, write_recipe
from tests.build.inline import Bench

RECIPE = """\
seed = 7

[weighted_sum.soft]
checkpoints = ["base", "ink"]
weights = [0.6, 0.4]
blocks = { "unet.mid" = [0.5, 0.5] }

[lora.style]
on = "soft"
dataset = "drawings"
rank = 2
steps = 2
batch = 1
precision = "fp32"

[swap.other]
checkpoint = "soft"
vae = "ink"

[preset]
checkpoint = "other"
insert = ["word"]
bake = { style = 0.8, glow = -0.3 }
dtype = "bf16"
title = "Soft ink"
licence = "CC0-1.0"
trigger = ["ink", "soft"]
clip_skip = 1
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, bench_files: Path) -> Bench:
    shutil.copytree(bench_files, tmp_path_factory.mktemp("rebuild") / "project")
    bench = Bench(next(tmp_path_factory.getbasetemp().glob("rebuild*/project")))
    bench.recipe(RECIPE)
    bench.build()
    return bench


@pytest.fixture
def preset(original: Bench) -> Path:
    return original.root / "out" / "r" / "r.safetensors"


def test_another_project_with_the_sources_makes_the_same_file(original: Bench, preset: Path, tmp_path: Path) -> None:
    """No recipe, no lock and no cache: what is in the file is enough."""
    other = original.clone(tmp_path / "other")
    shutil.rmtree(other.root / "recipes")
    (other.root / "forge.lock").unlink()
    lone = tmp_path / "Soft Ink.safetensors"
    shutil.copyfile(preset, lone)
    name = write_recipe(other.session(), lone)
    assert name == "soft-ink"
    built = other.built(name)
    assert [target.partition("-")[0] for target in built] == ["weighted_sum", "lora", "cast", "preset.export"]
    assert (other.root / "out" / name / f"{name}.safetensors").read_bytes() == preset.read_bytes()


def test_sources_are_found_by_what_they_are_in_the_folders_of_this_machine(
    original: Bench, preset: Path, tmp_path: Path
) -> None:
    other, models = tmp_path / "other", tmp_path / "models"
    other.mkdir()
    shutil.copytree(original.root / "drawings", other / "drawings")
    for name, renamed in (("base", "a/first"), ("ink", "b/second")):
        shutil.copytree(original.root / name, models / renamed)
    for name, renamed in (("glow", "lights"), ("word", "word")):
        shutil.copyfile(original.root / f"{name}.safetensors", models / f"{renamed}.safetensors")
    (other / "forge.toml").write_text('[dataset.mine]\npath = "drawings"\ntrigger = "<toy>"\n')
    (other / "forge.local.toml").write_text(f"folders = [{json.dumps(str(models))}]\n")
    bench = Bench(other)
    name = write_recipe(bench.session(), preset)
    text = (other / "recipes" / f"{name}.toml").read_text()
    assert 'from = "a/first"' in text
    assert 'from = "lights.safetensors"' in text
    keys = {step.key for step in bench.plan(name).steps.values() if step.key}
    assert original.plan().steps["r:soft"].key in keys


def test_a_folder_of_one_network_is_found_too_and_leaves_the_family_to_the_others(
    bench_files: Path, tmp_path: Path
) -> None:
    shutil.copytree(bench_files / "ink" / "vae", tmp_path / "models" / "vae")
    shutil.copytree(bench_files / "base", tmp_path / "models" / "a-base")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "forge.toml").touch()
        (tmp_path / name / "forge.local.toml").write_text(f"folders = [{json.dumps(str(tmp_path / 'models'))}]\n")
    sources = '[source.base]\nfrom = "a-base"\n[source.vae]\nfrom = "vae"\n'
    swap = '[swap.other]\ncheckpoint = "base"\nvae = "vae"\n[preset]\ncheckpoint = "other"\ndtype = "bf16"\n'
    first, second = Bench(tmp_path / "first"), Bench(tmp_path / "second")
    first.recipe(sources + swap)
    first.build()
    made = first.root / "out" / "r" / "r.safetensors"
    name = write_recipe(second.session(), made)
    assert 'family = "sd15"' in (second.root / "recipes" / f"{name}.toml").read_text()
    second.build(name)
    assert (second.root / "out" / name / f"{name}.safetensors").read_bytes() == made.read_bytes()


def test_sources_that_are_not_at_hand_are_named_with_their_identities(
    original: Bench, preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifacts = {link.use.reference: a for s in original.plan().steps.values() for link, a in s.inputs if a is not None}
    (tmp_path / "empty" / "recipes").mkdir(parents=True)
    (tmp_path / "empty" / "forge.toml").write_text("")
    assert main(["-C", str(tmp_path / "empty"), "build", str(preset)]) == 2
    said = capsys.readouterr().err
    for name, kind in (("base", "checkpoint"), ("ink", "checkpoint"), ("glow", "lora"), ("drawings", "dataset")):
        assert f"{kind} {artifacts[name].identity}" in said
    assert list((tmp_path / "empty" / "recipes").iterdir()) == []


def test_in_its_own_project_everything_is_reused(original: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["-C", str(original.root), "build", "out/r/r.safetensors"]) == 0
    assert "out/r-again/r-again.safetensors is that file, byte for byte" in capsys.readouterr().out
    assert main(["-C", str(original.root), "build", "--json", "out/r/r.safetensors"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {"v": 1, "event": "rebuilt", "recipe": "r-again", "equal": True}
    (original.root / "recipes" / "r-again.toml").unlink()


def test_the_recipe_is_shown_without_being_written(
    original: Bench, preset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["-C", str(original.root), "show", "--recipe", str(preset)]) == 0
    said = capsys.readouterr().out
    assert 'title = "Soft ink"' in said
    assert 'checkpoints = ["base", "ink"]' in said
    assert [path.name for path in (original.root / "recipes").iterdir()] == ["r.toml"]


HOSTILE = [
    "",
    "{",
    '{"v":2,"actions":[]}',
    '{"v":1,"actions":[]}',
    '{"v":1,"actions":[{"method":"swap","inputs":{"checkpoint":[0]}}]}',
    '{"v":1,"actions":[{"source":"x"}]}',
    '{"v":1,"actions":[7]}',
    '{"v":1,"actions":[{"manifest":{"method":"cast","family":"..store"},"inputs":{}}]}',
]


def test_a_pickle_carries_no_recipe_and_is_told_as_such(original: Bench, tmp_path: Path) -> None:
    write_pickle(tmp_path / "x.ckpt", {"a": 1})
    with pytest.raises(UsageError, match="is a pickle, which carries no recipe"):
        recipe_text(original.session(), tmp_path / "x.ckpt")


@pytest.mark.parametrize("text", HOSTILE)
def test_manifests_that_forge_did_not_write_are_refused(original: Bench, text: str, tmp_path: Path) -> None:
    path = write_small(tmp_path, {"sdforge.manifest": text} if text else {})
    with pytest.raises(UsageError, match="holds no manifests of forge that can be read"):
        recipe_text(original.session(), path)


def write_small(folder: Path, metadata: dict[str, str]) -> Path:
    """Write a file of one byte with metadata."""
    write_file(folder / "x.safetensors", {"x": ("U8", (1,))}, lambda _: [b"1"], metadata)
    return folder / "x.safetensors"


def test_a_method_of_another_version_is_remarked_and_adds_no_line(
    original: Bench, preset: Path, tmp_path: Path
) -> None:
    metadata = read_header(preset).metadata
    value = json.loads(metadata["sdforge.manifest"])
    (entry,) = (e for e in value["actions"] if e.get("manifest", {}).get("method") == "weighted_sum")
    entry["manifest"]["version"] = "0\n[preset]"
    path = write_small(tmp_path, metadata | {"sdforge.manifest": json.dumps(value)})
    text = recipe_text(original.session(), path)
    assert 'was made with version "0\\n[preset]", here ' in text.splitlines()[1]
    assert text.count("\n[preset]") == 1
