"""A LoRA's way through a project: extracted, resized, merged, baked and exported by one `forge build`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sdforge.cli import main
from sdforge.errors import ResourceError
from sdforge.run import low_rank
from tests.families.workbench import Taken, take
from tests.quick import Here

RECIPE = """\
family = "sd15"

[extract.learned]
tuned = "other"
base = "toy"
rank = 4
components = ["text_encoder"]
dtype = "fp32"

[resize.fewer]
lora = "learned"
rank = 1

[lora_merge.both]
loras.learned = { strength = 0.5 }
loras.fewer = { strength = 0.25 }

[bake.all]
checkpoint = "toy"
loras.both = {}

[preset]
checkpoint = "all"
bake = { fewer = 1.0 }
export = ["checkpoint", "loras"]
"""
MODULE = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"


@pytest.fixture
def root(toy: Taken, other: Taken, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert toy.artifact.kind == other.artifact.kind
    for name in ("toy", "other"):
        shutil.copytree(toys / name, tmp_path / name)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "x.toml").write_text(RECIPE)
    (tmp_path / "forge.toml").write_text('[source.toy]\nfrom = "toy"\n[source.other]\nfrom = "other"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_built_pinned_and_told_of(
    root: Path, toy: Taken, other: Taken, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "x"]) == 0
    loras = root / "out" / "x" / "loras"
    assert sorted(path.name for path in loras.glob("*.safetensors")) == ["both.safetensors", "fewer.safetensors"]
    tensors = take(loras / "fewer.safetensors").tensors("lora")
    found = tensors[f"{MODULE}.lora_up"].double() @ tensors[f"{MODULE}.lora_down"].double()
    name = f"{MODULE.removeprefix('text_encoder.')}.weight"
    difference = other.tensors("text_encoder")[name].double() - toy.tensors("text_encoder")[name].double()
    values = torch.linalg.svdvals(difference)
    assert float((difference - found).norm()) == pytest.approx(float(values[1:].norm()), rel=1e-4)
    baked = take(root / "out" / "x" / "x.safetensors")
    assert baked.identity("unet") == toy.identity("unet")
    assert not torch.equal(baked.tensors("text_encoder")[name], toy.tensors("text_encoder")[name])
    lock = (root / "forge.lock").read_text()
    assert lock.count('method = "extract"') == lock.count('method = "resize"') == 1
    assert 'method = "lora_merge"' not in lock  # a formula: made again, the same bytes
    capsys.readouterr()
    assert main(["build", "x"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["log", "x:learned"]) == 0
    assert "of the norm is left out" in capsys.readouterr().out


def test_an_extraction_that_breaks_off_goes_on_from_there(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its states are in the cache until the LoRA is."""
    monkeypatch.setattr("sdforge.commands.LocalExecutor", Here)
    (root / "forge.local.toml").write_text("[run.states]\nminutes = 1e-9\n")
    made, done = low_rank._extract, []

    def few(*arguments: Any) -> float:
        if len(done) == 5:
            raise ResourceError("no more")
        done.append(arguments[2])
        return made(*arguments)

    monkeypatch.setattr(low_rank, "_extract", few)
    assert main(["build", "x:learned"]) == 4
    states = root / "cache" / "v1" / "states"
    assert sorted(path.name for path in states.glob("*/*/*.json")) == ["4.json", "5.json"]
    monkeypatch.setattr(low_rank, "_extract", made)
    capsys.readouterr()
    assert main(["build", "x:learned"]) == 0
    assert "learned: going on from part 5" in capsys.readouterr().out
    assert not list(states.glob("*/*"))
