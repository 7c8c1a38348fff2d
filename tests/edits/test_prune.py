"""Pruning: parts are left out with what belongs to them, and nothing is computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from sdforge.cli import main
from sdforge.edits import prune
from sdforge.errors import UsageError
from sdforge.families import family
from sdforge.session import open_session
from tests.families.toys import write_family
from tests.families.workbench import Taken, change_json, keep, take
from tests.formats.conftest import export


def planned(base: Taken, *without: str) -> Any:
    table = prune.TABLE.model_validate({"checkpoint": "base", "without": list(without)})
    return prune.plan(table, {"checkpoint": [base.input()]}, family(base.artifact.family))


def test_a_part_is_left_out_with_its_facts(toy: Taken) -> None:
    plan = planned(toy, "vae")
    assert (plan.components, plan.without) == ({}, ("vae",))
    assert plan.facts == {"latent_scaling": None, "vae_groups": None}


def test_text_encoders_go_together_and_take_their_words_with_them(toys: Path) -> None:
    large = take(write_family(toys / "sdxl", "sdxl"))
    plan = planned(large, "text_encoder")
    assert plan.without == ("text_encoder", "text_encoder_2", "tokenizer")
    assert {"tokens", "text_heads_2"} <= set(plan.facts)
    assert "prediction" not in plan.facts


def test_an_image_encoder_takes_its_numbers_with_it(toys: Path) -> None:
    seen = take(write_family(toys / "unclip", "unclip"))
    assert planned(seen, "image_encoder").without == ("image_encoder", "image_normalizer")


def test_something_must_be_left_and_be_there(toy: Taken) -> None:
    with pytest.raises(UsageError, match="nothing would be left"):
        planned(toy, "unet", "vae", "text_encoder")
    with pytest.raises(UsageError, match=r"Stable Diffusion 1\.x has no image encoder"):
        planned(toy, "image_encoder")


RECIPE = """\
family = "sd15"

[prune.bare]
checkpoint = "toy"
without = ["vae"]

[swap.whole]
checkpoint = "bare"
vae = "toy"

[preset]
checkpoint = "bare"
export = ["checkpoint"]
"""


@pytest.fixture
def root(toy: Taken, toys: Path, tmp_path: Path) -> Path:
    assert toy.artifact.kind == "checkpoint"
    shutil.copytree(toys / "toy", tmp_path / "toy")
    change_json(tmp_path / "toy" / "vae" / "config.json", {"scaling_factor": 0.25})
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "x.toml").write_text(RECIPE)
    (tmp_path / "forge.toml").write_text('[source.toy]\nfrom = "toy"\n')
    return tmp_path


def test_in_a_recipe_nothing_runs_and_a_swap_makes_it_whole_again(root: Path) -> None:
    session = open_session(root)
    plan = session.plan(session.resolve(["x:bare"]))
    base, bare = session.sources.artifact(session.graph.sources["toy"]), plan.steps["x:bare"].artifact
    assert bare is not None
    assert set(bare.components) == set(base.components) - {"vae"}
    assert "latent_scaling" in base.facts
    assert "latent_scaling" not in bare.facts
    assert plan.steps["x:bare"].idle
    whole = session.plan(session.resolve(["x:whole"])).steps["x:whole"].artifact
    assert whole is not None
    assert whole.identity == base.identity


def test_a_preset_without_a_vae_is_a_file_without_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert main(["build", "x"]) == 0
    with safe_open(root / "out" / "x" / "x.safetensors", "pt") as file:
        names, stated = list(file.keys()), json.loads(file.metadata().get("sdforge.facts", "{}"))
    assert not any(name.startswith("first_stage_model.") for name in names)
    assert "latent_scaling" not in stated


def test_a_unet_alone_is_written(toy: Taken, tmp_path: Path) -> None:
    alone = keep(tmp_path / "kept", {"unet": toy.tensors("unet")}, facts=toy.artifact.facts)
    out = export(tmp_path / "out", alone, ["checkpoint", "diffusers"], {})
    assert sorted(p.name for p in (out / "diffusers").iterdir()) == ["model_index.json", "scheduler", "unet"]
    index = json.loads((out / "diffusers" / "model_index.json").read_text())
    assert {"vae", "text_encoder", "tokenizer"}.isdisjoint(index)
    assert take(out / "diffusers").identity("unet") == toy.identity("unet")
    with safe_open(out / "checkpoint.safetensors", "pt") as file:
        assert all(name.startswith("model.diffusion_model.") for name in file.keys())  # noqa: SIM118 -- it is no dict


def test_a_folder_with_a_text_encoder_needs_its_words(toy: Taken, tmp_path: Path) -> None:
    wordless = keep(tmp_path / "kept", {part: toy.tensors(part) for part in ("unet", "text_encoder", "vae")})
    with pytest.raises(UsageError, match="needs a tokenizer") as caught:
        export(tmp_path / "out", wordless, ["diffusers"], {})
    assert "[swap.NAME]" in caught.value.hint
