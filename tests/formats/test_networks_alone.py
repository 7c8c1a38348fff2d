"""A U-Net or a VAE of its own: a file under every name that programs give its tensors, or a folder of diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdforge.errors import RecipeError, UsageError
from sdforge.families import family_names
from sdforge.families.naming import VAE_ATTENTION_OLD
from sdforge.families.stable_diffusion import CROSS
from sdforge.formats.layout import read_layout
from sdforge.session import open_session
from tests.families.toys import write_family
from tests.families.workbench import Taken, change_json, take

SINGLE = "first_stage_model."
WEIGHTS = "diffusion_pytorch_model.safetensors"


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


def ldm_vae(exported: Path, start: str = "") -> dict[str, Tensor]:
    tensors = load_file(exported / "checkpoint.safetensors")
    return {start + name.removeprefix(SINGLE): t for name, t in tensors.items() if name.startswith(SINGLE)}


def old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As diffusers before 0.17 called the VAE's attention."""
    for old, new in VAE_ATTENTION_OLD.items():
        place, before = f".attentions.0.{new}.", f".attentions.0.{old}."
        tensors = {name.replace(place, before): tensor for name, tensor in tensors.items()}
    return tensors


@pytest.mark.parametrize("named", ["LDM", "LDM as in a checkpoint", "LDM with what it was trained with", "new", "old"])
def test_a_vae_alone_is_that_of_the_checkpoint(named: str, toy: Taken, exported: Path, tmp_path: Path) -> None:
    diffusers = load_file(exported / "diffusers" / "vae" / WEIGHTS)
    tensors = {
        "LDM": ldm_vae(exported),
        "LDM as in a checkpoint": ldm_vae(exported, SINGLE),
        "LDM with what it was trained with": ldm_vae(exported) | {"loss.logvar": torch.zeros(())},
        "new": diffusers,
        "old": old_names(diffusers),
    }[named]
    found = take(saved(tmp_path / "vae.safetensors", tensors))
    assert (found.artifact.kind, found.artifact.family, found.artifact.facts) == ("checkpoint", "", {})
    assert {name: found.identity(name) for name in found.artifact.components} == {"vae": toy.identity("vae")}


@pytest.mark.parametrize("name", family_names())
def test_a_unet_in_diffusers_names_tells_its_family(name: str, toys: Path, tmp_path: Path) -> None:
    folder = write_family(toys / name, name)
    expected = {"image_variations": "sd15"}.get(name, name)  # its U-Net is that of 1.x
    path = Path(shutil.copy(folder / "unet" / WEIGHTS, tmp_path / "unet.safetensors"))
    found = take(path)
    assert found.artifact.family == expected
    assert {part: found.identity(part) for part in found.artifact.components} == {"unet": take(folder).identity("unet")}
    assert ("unsaid" in read_layout(path).notes) == (expected in ("sd2", "unclip"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lost": "decoder.conv_out.bias"}, "a vae without decoder.conv_out.bias"),
        ({"more": "decoder.odd.weight"}, "tensors that no vae here has: decoder.odd.weight"),
        ({"more": f"{SINGLE}decoder.conv_in.bias"}, "no vae here has: decoder.conv_in.bias"),
    ],
)
def test_what_is_no_whole_vae_is_refused(change: dict[str, str], words: str, exported: Path, tmp_path: Path) -> None:
    tensors = ldm_vae(exported)
    tensors.pop(change.get("lost", ""), None)
    tensors |= {change["more"]: torch.zeros(1)} if "more" in change else {}
    with pytest.raises(UsageError, match=words):
        read_layout(saved(tmp_path / "vae.safetensors", tensors))


def test_the_unet_of_an_inpainting_checkpoint_is_refused_by_name(exported: Path, tmp_path: Path) -> None:
    tensors = load_file(exported / "diffusers" / "unet" / WEIGHTS)
    tensors["conv_in.weight"] = torch.zeros(8, 9, 3, 3)
    with pytest.raises(UsageError, match="the U-Net of an inpainting checkpoint"):
        read_layout(saved(tmp_path / "unet.safetensors", tensors))


def test_a_unet_of_no_family_is_refused_as_one(exported: Path, tmp_path: Path) -> None:
    tensors = load_file(exported / "diffusers" / "unet" / WEIGHTS)
    tensors["mid_block.odd.weight"] = torch.zeros(1)
    with pytest.raises(UsageError, match="a U-Net of no family"):
        read_layout(saved(tmp_path / "unet.safetensors", tensors))


def as_it_is(folder: Path) -> None:
    assert (folder / WEIGHTS).is_file()


def parted(folder: Path) -> None:
    """Lay a network's weights out in two files, as diffusers does with large ones."""
    tensors = load_file(folder / WEIGHTS)
    names, places = sorted(tensors), dict[str, str]()
    for part in (names[::2], names[1::2]):
        shard = WEIGHTS.replace(".", f"-{len(places):05}-of-2.", 1)
        save_file({name: tensors[name] for name in part}, folder / shard)
        places |= dict.fromkeys(part, shard)
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))


def variant(folder: Path) -> None:
    """Call the weights as diffusers calls a copy in fp16."""
    (folder / WEIGHTS).rename(folder / WEIGHTS.replace(".", ".fp16.", 1))


@pytest.mark.parametrize("laid_out", [as_it_is, parted, variant])
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_folder_of_one_network_is_that_network(
    part: str, laid_out: Any, toy: Taken, toys: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(toys / "toy" / part, tmp_path / part))
    laid_out(folder)
    found = take(folder)
    assert (found.artifact.kind, found.artifact.family) == ("checkpoint", "sd15" if part == "unet" else "")
    assert {name: found.identity(name) for name in found.artifact.components} == {part: toy.identity(part)}
    assert read_layout(folder).files[-1] == folder / "config.json"


@pytest.mark.parametrize("name", family_names())
def test_a_unets_folder_states_what_its_file_does_not_tell(name: str, toys: Path, tmp_path: Path) -> None:
    whole = take(write_family(toys / name, name)).artifact
    alone = take(Path(shutil.copytree(toys / name / "unet", tmp_path / "unet"))).artifact
    assert alone.family == {"image_variations": "sd15"}.get(name, name)
    of_unet = {"unet_heads", "unet_groups", "resolution"}
    assert {fact: value for fact, value in whole.facts.items() if fact in of_unet} == alone.facts


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({}, {"vae_groups": 4, "latent_scaling": 0.2}),
        ({"scaling_factor": None, "norm_num_groups": None}, {"vae_groups": 32}),
        ({"scaling_factor": 0.18215}, {"vae_groups": 4, "latent_scaling": 0.18215}),
    ],
)
def test_a_vaes_folder_states_its_scale_or_nothing(
    change: dict[str, Any], facts: dict[str, Any], toys: Path, toy: Taken, tmp_path: Path
) -> None:
    assert toy.artifact.facts["latent_scaling"] == 0.2
    folder = Path(shutil.copytree(toys / "toy" / "vae", tmp_path / "vae"))
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    assert take(folder).artifact.facts == facts


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("unet", {"act_fn": "gelu"}, "unet is not Stable Diffusion 1.x: unet states act_fn = 'gelu', expected 'silu'"),
        ("vae", {"latent_channels": 8}, "vae is not Stable Diffusion 1.x: vae states latent_channels = 8, expected 4"),
        ("vae", {"scaling_factor": "odd"}, "vae states latent scaling as 'odd' where a number above 0 belongs"),
        ("unet", {"norm_num_groups": 4.5}, "unet states unet groups as 4.5 where one whole number above 0 belongs"),
    ],
)
def test_a_folder_that_states_something_else_is_refused(
    part: str, change: dict[str, Any], words: str, toys: Path, toy: Taken, tmp_path: Path
) -> None:
    assert part in toy.artifact.components
    folder = Path(shutil.copytree(toys / "toy" / part, tmp_path / part))
    change_json(folder / "config.json", change)
    with pytest.raises(UsageError, match=words):
        read_layout(folder)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"decoder.conv_in.weight": (8, 16, 3, 3), "encoder.conv_in.weight": (8, 3, 3, 3)}, "the VAE of Stable Diff"),
        (
            {
                "conv_in.weight": (8, 4, 3, 3),
                CROSS: (8, 8),
                "add_embedding.linear_1.weight": (8, 8),
                "down_blocks.3.resnets.0.conv1.weight": (8, 8, 3, 3),
            },
            "the U-Net of the refiner",
        ),
        (
            {
                "model.diffusion_model.label_emb.0.0.weight": (8, 8),
                "model.diffusion_model.input_blocks.11.0.in_layers.2.weight": (8, 8, 3, 3),
            },
            "is the refiner",
        ),
    ],
)
def test_networks_of_other_architectures_are_refused_by_name(
    tensors: dict[str, tuple[int, ...]], words: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "other.safetensors", {name: torch.zeros(shape) for name, shape in tensors.items()})
    with pytest.raises(UsageError, match=words):
        read_layout(path)


@pytest.fixture
def project(toys: Path, toy: Taken, exported: Path, tmp_path: Path) -> Path:
    """The toy, whose VAE has a scale of its own (0.2), and another VAE in a file."""
    assert toy.artifact.facts["latent_scaling"] == 0.2
    shutil.copytree(toys / "toy", tmp_path / "toy")
    saved(tmp_path / "vae.safetensors", {name: 2 * tensor for name, tensor in ldm_vae(exported).items()})
    (tmp_path / "recipes").mkdir()
    (tmp_path / "forge.toml").write_text('[source.toy]\nfrom = "toy"\n[source.v]\nfrom = "vae.safetensors"\n')
    return tmp_path


def planned(root: Path, recipe: str) -> Any:
    (root / "recipes" / "r.toml").write_text(f'family = "sd15"\n{recipe}')
    session = open_session(root)
    session.plan(session.resolve(["r"]))
    return session.planner().steps["r:m"].artifact


def test_a_vae_alone_takes_the_place_of_a_checkpoint_s_own(project: Path, toy: Taken) -> None:
    """The facts of what was there hold: latents are scaled as the U-Net knows them."""
    found = planned(project, '[swap.m]\ncheckpoint = "toy"\nvae = "v"\n')
    parts = {name: component.identity for name, component in found.components.items()}
    other = take(project / "vae.safetensors").identity("vae")
    assert parts == {name: toy.identity(name) for name in toy.artifact.components} | {"vae": other}
    assert found.facts == toy.artifact.facts


def test_a_vae_alone_is_no_checkpoint_to_merge_or_to_draw_with(project: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(project, '[weighted_sum.m]\ncheckpoints = ["toy", "v"]\nweights = [0.5, 0.5]\n')
    assert "it has no unet at all" in caught.value.problems[0].hint


@pytest.mark.parametrize("silent", [True, False])
def test_a_vaes_folder_brings_its_scale_where_it_states_one(silent: bool, project: Path) -> None:
    vae = Path(shutil.copytree(project / "toy" / "vae", project / "vae"))
    config = json.loads((vae / "config.json").read_text()) | {"scaling_factor": 0.25}
    if silent:
        del config["scaling_factor"]
    (vae / "config.json").write_text(json.dumps(config))
    (project / "forge.toml").write_text('[source.toy]\nfrom = "toy"\n[source.v]\nfrom = "vae"\n')
    found = planned(project, '[swap.m]\ncheckpoint = "toy"\nvae = "v"\n')
    assert found.facts["latent_scaling"] == (0.2 if silent else 0.25)
