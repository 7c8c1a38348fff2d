"""LoRAs that nobody makes here, a source, become files of a preset as those that are trained do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sdforge.families import family
from sdforge.formats.custom_diffusion import MATRICES, raw_name
from tests.build.conftest import MID
from tests.build.inline import Bench
from tests.families.workbench import take

PRESET = """\
[preset]
checkpoint = "base"
bake = { glow = 0.5 }
title = "Mine"
licence = "mit"
trigger = ["mine"]
export = ["checkpoint", "loras"]
"""


@pytest.fixture
def licensed(bench: Bench) -> Bench:
    text = (bench.root / "forge.toml").read_text()
    stated = 'from = "glow.safetensors"\nlicence = "cc-by-nc-4.0"\ntrigger = ["glowing"]'
    (bench.root / "forge.toml").write_text(text.replace('from = "glow.safetensors"', stated))
    return bench


def loras(bench: Bench) -> list[str]:
    folder = bench.root / "out" / "r"
    return sorted(str(path.relative_to(folder)) for path in folder.glob("loras/*.safetensors"))


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
        return found


def test_it_is_written_under_its_name_and_says_whose_it_is(licensed: Bench) -> None:
    licensed.recipe(PRESET)
    licensed.build()
    assert loras(licensed) == ["loras/glow.safetensors"]
    path, source = licensed.root / "out" / "r" / "loras" / "glow.safetensors", licensed.root / "glow.safetensors"
    assert take(path).artifact.digest == take(source).artifact.digest
    told = metadata(path)
    assert (told["ss_network_dim"], told["modelspec.architecture"]) == ("2", "stable-diffusion-v1/lora")
    # title, licence and words are the preset's, which are none of this file's; words it has of its own
    assert not told.keys() & {f"modelspec.{name}" for name in ("title", "license")}
    assert told["modelspec.trigger_phrase"] == "glowing"
    rows = json.loads((licensed.root / "out" / "r" / "preset.json").read_text())["files"]
    row = next(row for row in rows if row["kind"] == "lora")
    expected = {"path": "loras/glow.safetensors", "licence": "cc-by-nc-4.0", "trigger": ["glowing"], "strength": 0.5}
    assert expected.items() <= row.items()
    assert licensed.states() == dict.fromkeys(licensed.states(), "reuse")


def test_another_licence_of_the_source_is_told_without_a_new_file(licensed: Bench) -> None:
    licensed.recipe(PRESET)
    licensed.build()
    path = licensed.root / "forge.toml"
    path.write_text(path.read_text().replace("cc-by-nc-4.0", "cc0-1.0"))
    assert licensed.built() == []
    rows = json.loads((licensed.root / "out" / "r" / "preset.json").read_text())["files"]
    assert [row.get("licence") for row in rows if row["kind"] == "lora"] == ["cc0-1.0"]


def test_other_words_of_the_source_are_another_header(licensed: Bench) -> None:
    licensed.recipe(PRESET)
    licensed.build()
    path = licensed.root / "out" / "r" / "loras" / "glow.safetensors"
    before = metadata(path)
    forge = licensed.root / "forge.toml"
    forge.write_text(forge.read_text().replace('"glowing"', '"bright"'))
    assert licensed.built() == ["preset.export"]
    after = metadata(path)
    assert {name for name in before if before[name] != after.get(name)} == {"modelspec.trigger_phrase"}
    assert after["modelspec.trigger_phrase"] == "bright"


def test_one_that_is_baked_twice_is_written_once(licensed: Bench) -> None:
    licensed.recipe(f'[bake.once]\ncheckpoint = "base"\nloras.glow = {{}}\n{PRESET.replace("base", "once")}')
    licensed.build()
    assert loras(licensed) == ["loras/glow.safetensors"]


def test_it_is_not_written_unless_loras_are_wanted(licensed: Bench) -> None:
    """Nor does it enter the export's key there: presets of before keep theirs."""
    licensed.recipe(PRESET.replace(', "loras"', ""))
    export = licensed.plan().steps["r:preset.export"]
    assert [link.use.role for link, _ in export.inputs] == ["checkpoint"]
    licensed.build()
    assert loras(licensed) == []


def test_diffusers_form_is_written_too(licensed: Bench) -> None:
    licensed.recipe(PRESET.replace('"loras"', '"loras-diffusers"'))
    licensed.build()
    assert loras(licensed) == ["loras/glow.diffusers.safetensors"]
    assert any(MID.split("_attentions")[0] in name for name in _names(licensed.root / "out" / "r" / loras(licensed)[0]))


def _names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_the_words_alone_of_custom_diffusion_are_embeddings_to_other_programs(bench: Bench) -> None:
    """Its folder is diffusers' own, and stays what it is."""
    folder = bench.root / "cat"
    folder.mkdir()
    weights = take(bench.root / "base").tensors("unet")
    save_file(
        {raw_name(name): torch.ones(weights[name].shape) for name in family("sd15").cross_attention}, folder / MATRICES
    )
    save_file({"<cat>": torch.ones(2, 8)}, folder / "learned_embeds.safetensors")
    with (bench.root / "forge.toml").open("a") as file:
        file.write('\n[source.cat]\nfrom = "cat"\n')
    bench.recipe(
        '[bake.with_cat]\ncheckpoint = "base"\ncustom.cat = {}\n'
        '[preset]\ncheckpoint = "with_cat"\nexport = ["custom", "custom-embeddings"]\n'
    )
    bench.build()
    rows = json.loads((bench.root / "out" / "r" / "preset.json").read_text())["files"]
    kinds = {row["path"]: row["kind"] for row in rows if row["path"].endswith(".safetensors")}
    assert kinds == {
        "custom/cat.safetensors": "embedding",
        f"custom/cat/{MATRICES}": "custom",
        "custom/cat/learned_embeds.safetensors": "custom",
    }
    (about,) = (row for row in rows if row["kind"] == "about")
    assert (about["path"], about["of"]) == ("custom/cat.json", "custom/cat.safetensors")
