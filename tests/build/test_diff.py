"""`forge diff`: what differs between presets, builds and files, with how far their tensors are apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdforge.cli import main
from sdforge.formats.own import MANIFEST
from sdforge.run.difference import Lies, apart
from tests.build.inline import Bench

PRESET = """
[weighted_sum.soft]
checkpoints = ["base", "ink"]
weights = [0.5, 0.5]
[preset]
checkpoint = "soft"
bake = { glow = 0.5 }
[preset.previews]
prompts = ["a cat"]
seeds = [1]
steps = 1
"""


def diff(bench: Bench, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["-C", str(bench.root), "diff", "--json", *arguments]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_build_is_compared_with_the_one_before(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.recipe(PRESET)
    bench.build()
    assert diff(bench, capsys, "r", code=2)["message"] == "no earlier build of r is known here"
    old = load_file(bench.root / "out" / "r" / "r.safetensors")
    kept = bench.root / "kept.safetensors"
    (bench.root / "out" / "r" / "r.safetensors").rename(kept)
    (bench.root / "drawings" / "0.txt").write_text("another caption\n")  # nobody reads it
    bench.recipe(PRESET.replace("glow = 0.5", "glow = 2.0"))
    bench.build()
    found = diff(bench, capsys, "r", "--exit-code", code=10)
    assert found["settings"] == [["preset.bake", "loras.glow.strength", 0.5, 2.0]]
    (unet,) = [each for each in found["components"] if each["changed"]]
    new = load_file(bench.root / "out" / "r" / "r.safetensors")
    (name,) = [name for name in old if not torch.equal(old[name], new[name])]
    gap = (old[name].double() - new[name].double()).norm()
    assert (unet["component"], unet["changed"]) == ("unet", 1)
    assert unet["distance"] == pytest.approx(float(gap), rel=1e-9)
    assert unet["relative"] == pytest.approx(float(gap / old[name].double().norm()), rel=1e-9)
    assert found["pictures"][0][:2] == [1, 1]
    # the file that was moved away is the same build, told by itself
    by_file = diff(bench, capsys, "kept.safetensors", "r")
    assert by_file["settings"] == [["bake", "loras[1].strength", 0.5, 2.0]]
    assert [each["distance"] for each in by_file["components"] if each["changed"]] == [unet["distance"]]


def test_a_build_of_a_variant_is_no_build_of_its_recipe(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bare = PRESET[: PRESET.index("[preset.previews]")]
    variant = "[variant.strong]\nsoft.weights = [0.1, 0.9]\n"
    bench.recipe(bare + variant)
    bench.build()
    bench.recipe(bare.replace("[0.5, 0.5]", "[0.2, 0.8]").replace("glow = 0.5", "glow = 2.0") + variant)
    bench.build("r@strong")
    bench.build()
    changed = [row[:2] for row in diff(bench, capsys, "r")["settings"]]
    assert sorted(changed) == [["preset.bake", "loras.glow.strength"], ["soft", "weights"]]


def test_what_is_equal_is_said_to_be(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("r", "twin"):
        bench.recipe(PRESET.replace("[preset]", '[preset]\ntitle = "Both"'), name)
    bench.build("r", "twin")
    assert diff(bench, capsys, "r", "twin", "--exit-code")["equal"]
    assert diff(bench, capsys, "recipes/r.toml", "twin", code=2)["hint"] == "name the recipe: forge diff r"
    sheet = bench.root / "pairs.png"
    assert main(["-C", str(bench.root), "diff", "r", "out/twin", "--pictures", str(sheet)]) == 0
    assert "they are equal" in capsys.readouterr().out
    with Image.open(sheet) as picture:
        assert picture.width > 3 * 128
    bench.recipe(PRESET.replace("0.5, 0.5", "0.25, 0.75"), "other")
    found = diff(bench, capsys, "r", "other", code=2)
    assert (found["message"], found["hint"]) == ("other has not been built yet", "forge build other")
    assert "no recipe and no target" in diff(bench, capsys, "r", "nothing", code=2)["message"]
    bench.recipe(PRESET + "[sweep.two]\nsoft.weights = [[0.0, 1.0], [0.5, 0.5]]\n", "swept")
    found = diff(bench, capsys, "swept@two", code=2)
    assert found["message"] == "swept@two is a sweep of 2 presets"
    (bench.root / "out" / "swept@two").mkdir()
    (bench.root / "out" / "swept@two" / "preset.json").write_text('{"preset": "swept@two", "grid": {}}')
    assert "the grid of a sweep" in diff(bench, capsys, "out/swept@two", "twin", code=2)["message"]
    for damaged in ("{", "[1]"):
        (bench.root / "out" / "swept@two" / "preset.json").write_text(damaged)
        said = diff(bench, capsys, "out/swept@two", "twin", code=2)["message"]
        assert said.endswith("out/swept@two/preset.json is not what forge wrote")
    found = diff(bench, capsys, "swept@two", code=2)
    assert found["hint"].endswith("forge diff swept@two-1 swept@two-2")


def test_a_source_is_as_it_was_though_what_stands_beside_it_is_not(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = '[weighted_sum.{0}]\ncheckpoints = ["base", "ink"]\nweights = [{1}, 0.5]\n'
    text = merged.format("own", 0.5) + '[weighted_sum.both]\ncheckpoints = ["ink", "own"]\nweights = [0.5, 0.5]\n'
    bench.recipe(text + '[preset]\ncheckpoint = "both"\n')
    bench.build()
    bench.recipe(text.replace("weights = [0.5, 0.5]", "weights = [0.2, 0.8]", 1) + '[preset]\ncheckpoint = "both"\n')
    bench.build()
    found = diff(bench, capsys, "r")
    assert found["settings"] == [["own", "weights", [0.5, 0.5], [0.2, 0.8]]]
    assert found["inputs"] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_norms_are_those_of_fp64_whatever_the_type(tmp_path: Path, dtype: torch.dtype) -> None:
    one, two = (torch.randn(300, 7, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (1, 2))
    names = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
    lies = []
    for name, tensor in (("one", one), ("two", two)):
        save_file({"x": tensor}, tmp_path / name)
        offset = (tmp_path / name).stat().st_size - tensor.nbytes
        lies.append(Lies(names[dtype], (300, 7), str(tmp_path / name), offset))
    found = apart(*lies)
    gap = one.double() - two.double()
    assert found.difference == pytest.approx(float((gap**2).sum()), rel=1e-12)
    assert found.largest == float(gap.abs().max())
    turned = apart(lies[0]._replace(turned=True, shape=(7, 300)), lies[0]._replace(turned=True, shape=(7, 300)))
    assert turned.difference == 0
    assert np.isclose(turned.first, found.first)


@pytest.mark.parametrize("command", ["build", "plan", "report", "diff", "log", "show"])
def test_a_recipe_that_makes_nothing_is_said_to(bench: Bench, capsys: pytest.CaptureFixture[str], command: str) -> None:
    bench.recipe('[dataset.more]\npath = "drawings"\n')
    assert main(["-C", str(bench.root), command, "r"]) == 2
    assert "error: r makes nothing" in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"v":', "[]", "\udcff"])
def test_a_description_that_forge_did_not_write_is_refused(
    bench: Bench, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (bench.root / "out" / "odd").mkdir(parents=True)
    (bench.root / "out" / "odd" / "preset.json").write_text(text, errors="surrogateescape")
    said = diff(bench, capsys, "out/odd", "out/odd", code=2)
    assert "preset.json is not what forge wrote" in said["message"]


@pytest.mark.parametrize(
    "action",
    [3, {"manifest": 3}, {"manifest": {"settings": [1]}}, {"manifest": {"settings": {}, "inputs": 3}}],
)
def test_how_a_file_was_made_is_not_believed_where_forge_would_not_say_it_so(
    action: Any, tmp_path: Path, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"emb_params": torch.zeros(1, 768)}, path, {MANIFEST: json.dumps({"actions": [action]})})
    assert diff(bench, capsys, str(path), str(path))["settings"] == []
    assert main(["show", str(path)]) == 0
    assert "made " not in capsys.readouterr().out
