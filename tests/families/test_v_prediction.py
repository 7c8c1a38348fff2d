"""Bases that predict v and end in pure noise (zero terminal SNR): what they are survives all the way to the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdforge.cli import main
from sdforge.formats.safetensors import read_header
from sdforge.rebuild import write_recipe
from tests.build.inline import Bench
from tests.families.toys import write_family
from tests.families.workbench import change_json, take
from tests.formats.conftest import export

FACTS = {"prediction": "v_prediction", "zero_terminal_snr": True}
SCHEDULE = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SPECS = {"sd2": "stable-diffusion-v2-768-v", "sdxl": "stable-diffusion-xl-v1-base"}
QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"  # 16 wide in both toys
RECIPE = """\
[weighted_sum.soft]
checkpoints = ["folder", "file"]
weights = [0.5, 0.5]
[bake.inked]
checkpoint = "soft"
loras.glow = { strength = 0.5 }
[preset]
checkpoint = "inked"
export = ["checkpoint", "diffusers"]
"""


@pytest.fixture(scope="module", params=SPECS)
def bench(request: pytest.FixtureRequest, toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A merge of a folder with a single file that only its markers tell, a LoRA on top, built."""
    root = tmp_path_factory.mktemp(f"v-{request.param}") / "project"
    for name, seed in (("folder", 1), ("other", 2)):
        place = toys / (request.param if seed == 1 else f"{request.param}-{seed}")
        shutil.copytree(write_family(place, request.param, seed), root / name)
        change_json(root / name / "scheduler" / "scheduler_config.json", SCHEDULE)
    single = export(root / "written", take(root / "other"), ["checkpoint"], {}) / "checkpoint.safetensors"
    _without_metadata(single, root / "file.safetensors")
    factors = {"lora_down.weight": torch.ones(2, 16), "lora_up.weight": torch.ones(16, 2), "alpha": torch.tensor(2.0)}
    save_file({f"{QUERY}.{name}": tensor.half() for name, tensor in factors.items()}, root / "glow.safetensors")
    sources = {"folder": "folder", "file": "file.safetensors", "glow": "glow.safetensors"}
    (root / "forge.toml").write_text("".join(f'[source.{n}]\nfrom = "{place}"\n' for n, place in sources.items()))
    (root / "recipes").mkdir()
    (root / "recipes" / "r.toml").write_text(f'family = "{request.param}"\n{RECIPE}')
    bench = Bench(root)
    bench.build()
    return bench


def _without_metadata(file: Path, bare: Path) -> None:
    """As other programs write it: what is predicted is told by empty tensors alone."""
    save_file(load_file(file), bare)


def of(bench: Bench) -> str:
    return (bench.root / "recipes" / "r.toml").read_text().split('"')[1]


def facts(path: Path) -> dict[str, Any]:
    found = take(path).artifact.facts
    return {name: found[name] for name in FACTS if name in found}


def schedule(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return {name: found[name] for name in SCHEDULE}


def is_marked(file: Path, of: str) -> bool:
    header = read_header(file)
    told = (header.metadata["modelspec.prediction_type"], header.metadata["modelspec.architecture"])
    assert told == ("v", SPECS[of])
    return {"v_pred", "ztsnr"} <= set(header.tensors)


def test_the_files_say_so_in_the_words_of_every_program(bench: Bench) -> None:
    out = bench.root / "out" / "r"
    assert facts(bench.root / "file.safetensors") == facts(out / "r.safetensors") == facts(out / "diffusers") == FACTS
    assert is_marked(out / "r.safetensors", of(bench))
    assert schedule(out / "diffusers") == SCHEDULE
    sampler = json.loads((out / "preset.json").read_text())["sampler"]
    assert (sampler["prediction"], sampler["zero_terminal_snr"]) == ("v_prediction", True)


def test_diffusers_draws_as_the_folder_says(bench: Bench) -> None:
    from diffusers import DDIMScheduler

    found = DDIMScheduler.from_pretrained(bench.root / "out" / "r" / "diffusers" / "scheduler")
    assert found.config.prediction_type == "v_prediction"
    assert float(found.alphas_cumprod[-1]) < 1e-7  # nothing is left of the picture


def test_converting_keeps_it_both_ways(bench: Bench, tmp_path: Path) -> None:
    out, folder, file = bench.root / "out" / "r", tmp_path / "folder", tmp_path / "one.safetensors"
    assert main(["convert", str(out / "diffusers"), str(file)]) == 0
    assert main(["convert", str(file), str(folder)]) == 0
    assert facts(file) == facts(folder) == FACTS
    assert is_marked(file, of(bench))
    assert schedule(folder) == SCHEDULE


def test_a_build_from_the_file_alone_keeps_it(bench: Bench, tmp_path: Path) -> None:
    other = bench.clone(tmp_path / "other")
    shutil.rmtree(other.root / "recipes")
    made = bench.root / "out" / "r" / "r.safetensors"
    name = write_recipe(other.session(), Path(shutil.copy(made, tmp_path / "lone.safetensors")))
    other.build(name)
    again = other.root / "out" / name / f"{name}.safetensors"
    assert again.read_bytes() == made.read_bytes()
    assert facts(again) == FACTS


def test_a_mixed_pair_is_refused_by_the_plan_in_one_line(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = bench.clone(tmp_path / "other")
    change_json(other.root / "folder" / "scheduler" / "scheduler_config.json", {"prediction_type": "epsilon"})
    capsys.readouterr()
    assert main(["-C", str(other.root), "plan", "r"]) == 2
    said = capsys.readouterr().err
    assert said.count("error[") == 1
    assert "a checkpoint that predicts epsilon cannot be merged with one that predicts v_prediction" in said
