"""Variants that are built: what they share is made once, the lock holds them, sweeps become pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from sdforge.cli import main
from tests.build.inline import Bench

TRAINED = """
[lora.style]
on = "base"
dataset = "drawings"
rank = 2
steps = 1
precision = "fp32"

[bake.inked]
checkpoint = "base"
dtype = "fp32"
loras.style = { strength = 0.5 }

[preset]
checkpoint = "inked"

[sweep.ten]
inked.loras.style.strength = [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1]
"""
TAKEN = """
[bake.inked]
checkpoint = "base"
loras.glow = { strength = 0.5 }

[preset]
checkpoint = "inked"

[sweep.ten]
inked.loras.glow.strength = [0.1, 0.2, 0.3]
"""
DRAWN = """
[weighted_sum.soft]
checkpoints = ["base", "ink"]
weights = [0.6, 0.4]

[preset]
checkpoint = "soft"
export = ["loras"]

[preset.previews]
prompts = ["a cat"]
seeds = [1, 2]
steps = 1
resolution = 64
"""
GUIDED = "[sweep.two]\nsoft.weights = [[0.6, 0.4], [0.0, 1.0]]\npreset.previews.guidance = [1.0, 7.0]\n"


@pytest.fixture
def here(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench whose commands run their actions in this process."""
    for module in ("commands", "trial"):
        monkeypatch.setattr(f"sdforge.{module}.LocalExecutor", lambda _: bench)
    return bench


def run(bench: Bench, *arguments: str) -> int:
    return main(["-C", str(bench.root), *arguments])


def test_ten_strengths_are_one_training_and_ten_bakes_of_the_changed_tensors(bench: Bench) -> None:
    bench.recipe(TRAINED)
    built = bench.build("r@ten").built
    assert [name for name in built if name.endswith(":style")] == ["r:style"]
    assert sorted(name for name in built if name.endswith(":inked")) == sorted(f"r@ten-{i}:inked" for i in range(1, 11))
    lora, *bakes = sorted(bench.packs().values())
    assert len(bakes) == 10
    assert lora < bakes[0]
    assert bakes[-1] < bakes[0] + 100, "each holds the tensors that it changes, and none the base"


def test_the_lock_holds_a_variants_own_targets_and_forgets_them_with_it(bench: Bench) -> None:
    bench.recipe(TAKEN)
    bench.build("r@ten-1")
    bench.build("r@ten-2")
    targets = bench.session().lock.targets
    assert {name for name in targets if name.startswith("r@")} == {
        f"r@ten-{i}:{name}" for i in (1, 2) for name in ("inked", "preset.export")
    }
    bench.recipe(TAKEN.replace(", 0.2, 0.3", ""))
    bench.build("r@ten-1")
    assert {name.partition(":")[0] for name in bench.session().lock.targets} == {"r@ten-1"}


def test_clean_keeps_what_a_variant_needs(bench: Bench) -> None:
    bench.recipe(TAKEN)
    bench.build("r@ten-3")
    run(bench, "clean")
    assert bench.plan("r@ten-3").to_do == []


def test_a_variant_has_a_folder_of_its_own(bench: Bench) -> None:
    bench.recipe(TAKEN)
    bench.build("r@ten-3")
    about = json.loads((bench.root / "out" / "r@ten-3" / "preset.json").read_text())
    assert about["preset"] == "r@ten-3"
    assert (bench.root / "out" / "r@ten-3" / "r@ten-3.safetensors").is_file()
    assert not (bench.root / "out" / "r").exists()


def test_variants_that_trained_otherwise_are_in_one_program_side_by_side(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a variant has for itself is called so; what it shares with its recipe is the same file."""
    other = '[lora.shared]\non = "base"\ndataset = "drawings"\nrank = 1\nsteps = 1\nprecision = "fp32"\n'
    preset = '[preset]\ncheckpoint = "base"\nbake = { style = 0.5, shared = 0.5 }\nexport = ["checkpoint", "loras"]\n'
    bench.recipe(TRAINED.partition("[bake")[0] + other + preset + "[variant.longer]\nstyle.steps = 2\n")
    bench.build("r", "r@longer")
    files = {p.name for p in (bench.root / "out" / "r@longer" / "loras").glob("*.safetensors")}
    assert files == {"style-longer.safetensors", "shared.safetensors"}
    comfy = bench.root / "comfy"
    (comfy / "models" / "checkpoints").mkdir(parents=True)
    for preset in ("r", "r@longer"):
        assert run(bench, "install", preset, "--into", f"comfyui:{comfy}") == 0, capsys.readouterr().err
    found = {p.name for p in (comfy / "models").rglob("*.safetensors")}
    assert found == {*files, "style.safetensors", "r.safetensors", "r@longer.safetensors"}
    assert run(bench, "install", "r@longer", "--into", f"comfyui:{comfy}", "--undo") == 0
    left = {p.name for p in (comfy / "models").rglob("*.safetensors")}
    assert left == {"style.safetensors", "shared.safetensors", "r.safetensors"}


def test_another_recipe_may_take_from_a_variant(bench: Bench) -> None:
    bench.recipe(TAKEN)
    bench.recipe('[cast.half]\ncheckpoint = "r@ten-3:inked"\ndtype = "fp16"\n', "s")
    assert {"r@ten-3:inked", "s:half"} <= bench.plan("s").steps.keys()


def test_a_sweep_of_two_settings_is_drawn_once_as_a_grid(here: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    here.recipe(DRAWN + GUIDED)
    assert run(here, "build", "r@two", "--plain") == 0
    assert "out/r@two/grid.png" in capsys.readouterr().out
    folder = here.root / "out" / "r@two"
    about = json.loads((folder / "preset.json").read_text())["grid"]
    assert [axis["key"] for axis in about["axes"]] == ["soft.weights", "preset.previews.guidance"]
    assert [cell["recipe"] for cell in about["cells"]] == [False, False, True, False]
    check_cells(here.root, folder / about["file"], [cell["preset"] for cell in about["cells"]])
    assert run(here, "build", "r@two") == 0
    assert capsys.readouterr().out.endswith("everything is reused, nothing to do\n")
    (folder / "grid.png").unlink()
    assert run(here, "plan", "r@two", "--exit-code") == 10
    assert run(here, "build", "r@two") == 0
    assert (folder / "grid.png").is_file()


def check_cells(root: Path, path: Path, presets: list[str]) -> None:
    """Every picture of every cell is found in the grid, left to right and from top to bottom."""
    sheet, places = Image.open(path).convert("RGB"), []
    for seed in (1, 2):
        for preset in presets:
            picture = Image.open(root / "out" / preset / "previews" / f"1-{seed}-{preset}.png").convert("RGB")
            places.append(found(sheet, picture.resize((128, 128), Image.Resampling.LANCZOS)))
    for seed in (0, 4):
        (x0, y0), (x1, y1), (x2, y2), (x3, y3) = places[seed : seed + 4]
        assert (y0, y2, x0, x1) == (y1, y3, x2, x3)
        assert x0 < x1
        assert y0 < y2
    assert places[0][0] < places[4][0]


def found(sheet: Image.Image, picture: Image.Image) -> tuple[int, int]:
    import numpy as np

    whole, part = np.asarray(sheet), np.asarray(picture)
    for y, x in np.argwhere((whole[:-127, :-127] == part[0, 0]).all(-1)):
        if (whole[y : y + 128, x : x + 128] == part).all():
            return int(x), int(y)
    raise AssertionError("the picture is not in the sheet")


def test_forge_grid_draws_and_leaves_recipe_lock_and_presets_alone(
    here: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    here.recipe(DRAWN)
    before = (here.root / "recipes" / "r.toml").read_bytes()
    assert run(here, "grid", "r", "--x", "soft.weights=[0.5,0.5],[0.0,1.0]", "--plain") == 0
    said = capsys.readouterr().out
    assert "    2,1     soft.weights = [0.0, 1.0]\n" in said
    assert [line for line in said.splitlines() if "grid.png" in line] == ["    out/r@grid/grid.png"]
    assert sorted(path.name for path in (here.root / "out").iterdir()) == [".written", "r@grid"]
    assert (here.root / "recipes" / "r.toml").read_bytes() == before
    assert not (here.root / "forge.lock").exists()
    with Image.open(io.BytesIO((here.root / "out" / "r@grid" / "grid.png").read_bytes())) as sheet:
        assert sheet.height > 2 * 128, "one row for each seed"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["r@two-1", "--x", "soft.dtype=1"], "is drawn of a recipe, and 'r@two-1' is one of its variants"),
        (["r@nine", "--x", "soft.dtype=1"], "no variant 'nine'"),
        (["r", "--x", "preset.dtype=fp16,bf16"], """--x 'preset.dtype="fp16","bf16"'"""),
        (["r", "--x", "preset.previews.steps=1,2", "--y", "preset.previews.steps = 3"], "go through one setting"),
    ],
)
def test_a_grid_that_cannot_be_drawn_is_refused_with_the_way_out(
    bench: Bench, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    bench.recipe(DRAWN + GUIDED)
    assert run(bench, "grid", *arguments) == 2
    assert said in capsys.readouterr().err


def test_variants_that_are_advised_alike_are_advised_once(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    text = TRAINED.replace("steps = 1", "steps = 1\nwarmup = 9").partition("[sweep")[0]
    bench.recipe(text + "[sweep.two]\nstyle.rank = [2, 3]\n")
    assert run(bench, "check", "r") == 0
    assert capsys.readouterr().err.count("warning[warmup]") == 1
