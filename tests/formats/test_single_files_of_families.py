"""Single files of every family as other programs write them, and those that are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdforge.errors import UsageError
from sdforge.formats.layout import read_layout, transposed
from tests.families.toys import write_family
from tests.families.workbench import change_json, take
from tests.formats.conftest import export

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def files(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A single file of each of three families."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    for name in ("sd2", "sdxl", "unclip"):
        taken = take(write_family(toys / name, name))
        found[name] = export(folder / name, taken, ["checkpoint"], {}) / "checkpoint.safetensors"
    return found


def changed(path: Path, into: Path, change: dict[str, Tensor], lost: tuple[str, ...] = ()) -> Path:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor for name, tensor in (load_file(path) | change).items() if name not in lost}
    save_file(tensors, into, metadata)
    return into


def stock_like(name: str, path: Path) -> dict[str, Tensor]:
    """What the files of the trade hold beside what is used."""
    ids = torch.arange(77)[None]
    if name == "sdxl":
        return {
            "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": ids,
            "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
            "conditioner.embedders.0.text_projection": torch.ones(32, 32),
            "conditioner.embedders.0.transformer.text_projection.weight": torch.ones(32, 32),
            "denoiser.sigmas": torch.ones(1000),
        }
    last = "cond_stage_model.model.transformer.resblocks.1."
    layer = {n.replace(".1.", ".23."): t for n, t in load_file(path).items() if n.startswith(last)}
    assert len(layer) == 12
    more = {"cond_stage_model.model.text_projection": torch.ones(16, 16), "betas": torch.ones(1000)}
    if name == "unclip":
        more |= {
            "embedder.model.token_embedding.weight": torch.ones(4, 4),
            "embedder.model.logit_scale": torch.ones(()),
        }
    return layer | more | {"cond_stage_model.model.logit_scale": torch.tensor(4.6)}


@pytest.mark.parametrize("name", ["sd2", "sdxl", "unclip"])
def test_what_files_of_the_trade_hold_beside_is_read_over(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    more = stock_like(name, files[name])
    path = changed(files[name], tmp_path / "more.safetensors", more)
    assert take(path).artifact.digest == take(files[name]).artifact.digest
    assert sum(read_layout(path).passed.values()) == len(more)


def test_the_second_familys_text_encoder_may_be_named_as_in_the_later_code(
    files: dict[str, Path], tmp_path: Path
) -> None:
    """That does not make a refiner of it: its U-Net is told of no sizes."""
    more = {"cond_stage_model.model.text_projection": torch.ones(16, 16)}
    tensors = {
        name.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): tensor
        for name, tensor in (load_file(files["sd2"]) | more).items()
    }
    with safe_open(files["sd2"], "pt") as file:
        save_file(tensors, tmp_path / "x.safetensors", file.metadata())
    found = take(tmp_path / "x.safetensors").artifact
    assert (found.family, found.digest) == ("sd2", take(files["sd2"]).artifact.digest)


@pytest.mark.parametrize("said", [{}, {"modelspec.prediction_type": "epsilon"}])
def test_a_prediction_that_the_file_states_is_not_called_unsaid(
    said: dict[str, str], files: dict[str, Path], tmp_path: Path
) -> None:
    marked = ("v_pred", "ztsnr")
    tensors = {name: tensor for name, tensor in load_file(files["sd2"]).items() if name not in marked}
    save_file(tensors, tmp_path / "x.safetensors", said)
    assert ("unsaid" in read_layout(tmp_path / "x.safetensors").notes) == (not said)


def test_matrices_that_are_written_as_convolutions_are_the_same(files: dict[str, Path], tmp_path: Path) -> None:
    place = f"{UNET}middle_block.1.proj_in.weight"
    path = changed(
        files["sd2"], tmp_path / "conv.safetensors", {place: load_file(files["sd2"])[place][..., None, None]}
    )
    assert take(path).artifact.digest == take(files["sd2"]).artifact.digest


def test_a_folder_with_convolutions_in_place_of_matrices_is_of_the_same_family(toys: Path, tmp_path: Path) -> None:
    """A script of kohya's writes it so; the toy is told less than what tells the families apart."""
    plain, folder = write_family(toys / "sd2", "sd2"), tmp_path / "folder"
    shutil.copytree(plain, folder)
    change_json(folder / "unet" / "config.json", {"use_linear_projection": False, "cross_attention_dim": 1024})
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    around = (".proj_in.weight", ".proj_out.weight")
    turned = {n: t[..., None, None] if n.endswith(around) else t for n, t in load_file(path).items()}
    save_file({name: tensor.contiguous() for name, tensor in turned.items()}, path)
    assert (take(folder).artifact.family, take(folder).artifact.digest) == ("sd2", take(plain).artifact.digest)
    change_json(folder / "unet" / "config.json", {"cross_attention_dim": 768})
    assert take(folder).artifact.family == "sd15"


def test_a_file_of_unclip_without_statistics_can_be_loaded(files: dict[str, Path], tmp_path: Path) -> None:
    """Stability's own files have none: other programs take zeros and ones."""
    from sdforge.families.unclip.load import load

    lost = ("noise_augmentor.data_mean", "noise_augmentor.data_std")
    taken = take(changed(files["unclip"], tmp_path / "bare.safetensors", {}, lost))
    diffusion = load(taken.given(), torch.device("cpu"), torch.float32)
    labels = diffusion.imagine(torch.ones(1, 12)).added["class_labels"]
    assert torch.allclose(labels[0, :12], torch.ones(12), atol=1e-4)
    assert labels[0, 12:].tolist() == [1.0] * 6 + [0.0] * 6  # level 0: cosines, then sines


@pytest.mark.parametrize(
    ("name", "odd", "shape", "sentence"),
    [
        ("sdxl", "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight", (71, 24), "taken apart"),
        (
            "sdxl",
            "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias",
            (),
            "no text encoder 2 has",
        ),
        ("sdxl", "conditioner.embedders.1.model.text_projection", (24,), "no text encoder 2 has"),
        ("unclip", "embedder.model.visual.proj", (1, 2, 3), "no image encoder has"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(
    name: str, odd: str, shape: tuple[int, ...], sentence: str, files: dict[str, Path], tmp_path: Path
) -> None:
    path = changed(files[name], tmp_path / "odd.safetensors", {odd: torch.ones(shape)})
    with pytest.raises(UsageError, match=sentence):
        read_layout(path)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{UNET}double_blocks.0.img_attn.qkv.weight": (3, 1)}, "a FLUX checkpoint"),
        ({"double_blocks.0.img_attn.qkv.weight": (3, 1)}, "a FLUX checkpoint"),
        ({f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (3, 1)}, "a Stable Diffusion 3 checkpoint"),
        ({"conditioner.embedders.0.model.ln_final.weight": (4,)}, "the refiner of Stable Diffusion XL"),
        ({f"{UNET}input_blocks.0.0.weight": (4, 9, 3, 3)}, "an inpainting checkpoint"),
        ({f"{UNET}input_blocks.0.0.weight": (4, 8, 3, 3)}, "an InstructPix2Pix checkpoint"),
        ({"edm_vpred.sigma_max": ()}, "predicts as EDM does"),
        ({"edm_mean": (1, 4, 1, 1)}, "predicts as EDM does"),
    ],
)
def test_files_of_other_architectures_are_refused_by_name(
    tensors: dict[str, tuple[int, ...]], words: str, tmp_path: Path
) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=f"is {words}|{words}") as caught:
        read_layout(tmp_path / "other.safetensors")
    assert "forge list --families" in caught.value.hint


def test_the_refiners_folder_is_refused_by_name(toys: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(write_family(toys / "sdxl", "sdxl"), tmp_path / "folder"))
    shutil.rmtree(folder / "text_encoder")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"down_block_types": ["DownBlock2D"] * 4}))
    with pytest.raises(UsageError, match="the refiner of Stable Diffusion XL"):
        read_layout(folder)


@pytest.mark.parametrize("marker", ["v_pred", "ztsnr"])
def test_markers_are_facts_of_a_large_base_too(marker: str, files: dict[str, Path], tmp_path: Path) -> None:
    path = changed(files["sdxl"], tmp_path / "marked.safetensors", {marker: torch.empty(0)})
    facts: dict[str, Any] = {"v_pred": {"prediction": "v_prediction"}, "ztsnr": {"zero_terminal_snr": True}}
    assert facts[marker].items() <= take(path).artifact.facts.items()
    again = export(tmp_path / "again", take(path), ["checkpoint"], {})
    assert marker in load_file(again / "checkpoint.safetensors")


def test_the_specification_tells_a_v_base(files: dict[str, Path]) -> None:
    with safe_open(files["sd2"], "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    assert metadata["modelspec.prediction_type"] == "v"


def test_tensors_of_two_types_cannot_be_fused(toys: Path, tmp_path: Path) -> None:
    folder = write_family(toys / "sd2", "sd2")
    taken = take(folder)
    taken.tables["text_encoder"] = [
        t._replace(dtype="BF16") if t.name.endswith("layers.0.self_attn.k_proj.weight") else t
        for t in taken.tables["text_encoder"]
    ]
    with pytest.raises(UsageError, match="differ in type or shape"):
        export(tmp_path, taken, ["checkpoint"], {})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float32, torch.float64])
def test_a_matrix_is_turned_bit_by_bit(dtype: torch.dtype) -> None:
    matrix = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    data = bytes(matrix.view(torch.uint8).numpy())
    turned = bytes(matrix.t().contiguous().view(torch.uint8).numpy())
    assert transposed(data, 5, matrix.itemsize) == turned
    assert transposed(turned, 3, matrix.itemsize) == data


def test_what_a_file_does_not_say_is_said(files: dict[str, Path], tmp_path: Path) -> None:
    """Nothing in the tensors of Stable Diffusion 2 tells ε from v."""
    bare = tmp_path / "bare.safetensors"
    save_file({name: t for name, t in load_file(files["sd2"]).items() if name != "v_pred"}, bare)
    assert "prediction is taken to be epsilon" in read_layout(bare).notes["unsaid"]
    named = tmp_path / "named.safetensors"
    save_file(load_file(bare), named, {"modelspec.architecture": "stable-diffusion-v2-768-v"})
    assert read_layout(named).facts["prediction"] == "v_prediction"
    assert "unsaid" not in read_layout(files["sd2"]).notes | read_layout(files["sdxl"]).notes


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl", "unclip"])
def test_a_unet_alone_is_read_with_or_without_the_checkpoint_s_beginning(
    name: str, bare: bool, files: dict[str, Path], exported: Path, tmp_path: Path
) -> None:
    whole = files[name] if name in files else exported / "checkpoint.safetensors"
    tensors = {n.removeprefix(UNET) if bare else n: t for n, t in load_file(whole).items() if n.startswith(UNET)}
    save_file(tensors, tmp_path / "unet.safetensors")
    found = take(tmp_path / "unet.safetensors")
    assert found.artifact.family == name
    assert list(found.artifact.components) == ["unet"]
    assert found.identity("unet") == take(whole).identity("unet")
