"""Checkpoints as one file and as a folder: read as the same thing, opened by stock diffusers, written back the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdforge.errors import UsageError
from sdforge.formats.layout import read_layout
from tests.families.workbench import SD15, Taken, same_bytes, take
from tests.formats.conftest import export

PARTS = ("unet", "text_encoder", "vae")


def identities(taken: Taken) -> dict[str, str]:
    return {name: component.identity for name, component in taken.artifact.components.items()}


def changed(path: Path, into: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Write a single file again with other tensors, its metadata kept."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({n: t.contiguous() for n, t in change(load_file(path)).items()}, into, metadata)
    return into


def test_a_file_and_a_folder_of_one_checkpoint_are_the_same(toy: Taken, exported: Path) -> None:
    file, folder = take(exported / "checkpoint.safetensors"), take(exported / "diffusers")
    assert identities(file) == identities(folder) == identities(toy)
    assert file.artifact.facts == folder.artifact.facts == toy.artifact.facts
    assert file.artifact.digest == toy.artifact.digest


def test_export_writes_the_same_bytes_again(toy: Taken, exported: Path, tmp_path: Path) -> None:
    again = export(tmp_path / "again", take(exported / "diffusers"), ["checkpoint", "diffusers"], {})
    names = sorted(p.relative_to(exported) for p in exported.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert all((exported / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert toy.artifact.digest == take(again / "checkpoint.safetensors").artifact.digest


def test_a_title_changes_the_header_and_nothing_else(toy: Taken, exported: Path, tmp_path: Path) -> None:
    titled = export(tmp_path, toy, ["checkpoint"], {"title": "A toy", "licence": "CC0-1.0", "trigger": ["toy"]})
    path = titled / "checkpoint.safetensors"
    assert path.read_bytes() != (exported / "checkpoint.safetensors").read_bytes()
    assert take(path).artifact.digest == toy.artifact.digest
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.title"] == "A toy"
    assert metadata["modelspec.license"] == "CC0-1.0"
    assert metadata["modelspec.trigger_phrase"] == "toy"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"


@pytest.fixture(scope="module")
def stock(toy: Taken, toys: Path) -> StableDiffusionPipeline:
    assert toy.artifact.kind == "checkpoint"
    return StableDiffusionPipeline.from_pretrained(toys / "toy", dtype=torch.float32)


def outputs(pipeline: Any) -> list[Tensor]:
    """What the three networks say to fixed inputs."""
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 77, 16, generator=draw)
    pixels = torch.rand(1, 3, 64, 64, generator=draw) * 2 - 1
    ids = torch.tensor([pipeline.tokenizer("a red cat, <x> über 7!", padding="max_length", max_length=77).input_ids])
    with torch.no_grad():
        return [
            pipeline.unet(latents, 500, encoder_hidden_states=text).sample,
            pipeline.text_encoder(ids).last_hidden_state,
            pipeline.vae.encode(pixels).latent_dist.mode(),
            pipeline.vae.decode(latents).sample,
        ]


def test_stock_diffusers_opens_our_folder(stock: StableDiffusionPipeline, exported: Path) -> None:
    ours = StableDiffusionPipeline.from_pretrained(exported / "diffusers", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(outputs(stock), outputs(ours), strict=True))
    assert ours.vae.config.scaling_factor == 0.2
    assert ours.text_encoder.config.eos_token_id == ours.tokenizer.eos_token_id
    assert ours.tokenizer.model_max_length == 77


def test_stock_diffusers_opens_our_single_file(stock: StableDiffusionPipeline, exported: Path) -> None:
    ours = StableDiffusionPipeline.from_single_file(
        str(exported / "checkpoint.safetensors"),
        config=str(exported / "diffusers"),
        dtype=torch.float32,
        local_files_only=True,
    )
    assert all(torch.equal(a, b) for a, b in zip(outputs(stock), outputs(ours), strict=True))


def test_the_folders_text_encoder_has_the_names_that_older_programs_look_for(exported: Path) -> None:
    names = load_file(exported / "diffusers/text_encoder/model.safetensors")
    assert all(name.startswith("text_model.") for name in names)


def test_the_single_file_has_the_names_and_shapes_of_ldm(exported: Path) -> None:
    tensors = load_file(exported / "checkpoint.safetensors")
    assert "model.diffusion_model.input_blocks.0.0.weight" in tensors
    assert "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight" in tensors
    assert tensors["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    assert all(t.is_contiguous() for t in tensors.values())


def test_what_other_programs_put_beside_the_weights_is_no_change(toy: Taken, exported: Path, tmp_path: Path) -> None:
    def more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
        return tensors | {
            ids: torch.arange(77)[None],
            "model_ema.decay": torch.tensor(0.9),
            "model_ema.diffusion_modelinput_blocks00weight": torch.ones(2),
            "betas": torch.ones(1000),
            "alphas_cumprod": torch.ones(1000),
            "cond_stage_model.text_projection": torch.ones(16, 16),
            "cond_stage_model.transformer.text_projection.weight": torch.ones(16, 16),
        }

    path = changed(exported / "checkpoint.safetensors", tmp_path / "more.safetensors", more)
    assert take(path).artifact.digest == toy.artifact.digest
    passed = read_layout(path).passed
    assert sum(passed.values()) == 7
    assert any("position ids" in reason for reason in passed)


def test_text_encoder_names_of_the_novelai_kind_are_understood(toy: Taken, exported: Path, tmp_path: Path) -> None:
    def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace("transformer.text_model.", "transformer."): t for name, t in tensors.items()}

    path = changed(exported / "checkpoint.safetensors", tmp_path / "nai.safetensors", renamed)
    assert take(path).artifact.digest == toy.artifact.digest


def test_two_spellings_of_one_name_in_a_file_are_refused(exported: Path, tmp_path: Path) -> None:
    long = "cond_stage_model.transformer.text_model.final_layer_norm.bias"

    def twice(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {long.replace("text_model.", ""): tensors[long] + 1}

    path = changed(exported / "checkpoint.safetensors", tmp_path / "twice.safetensors", twice)
    with pytest.raises(UsageError, match="final_layer_norm"):
        read_layout(path)


def test_a_tensor_that_no_family_has_is_refused_by_name(exported: Path, tmp_path: Path) -> None:
    path = changed(
        exported / "checkpoint.safetensors",
        tmp_path / "odd.safetensors",
        lambda tensors: tensors | {"model.diffusion_model.control.weight": torch.ones(1)},
    )
    with pytest.raises(UsageError, match=r"model\.diffusion_model\.control\.weight"):
        read_layout(path)


@pytest.mark.parametrize(
    "lost", ["model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.weight", "final_layer_norm.bias"]
)
def test_a_missing_tensor_is_refused_by_name(lost: str, exported: Path, tmp_path: Path) -> None:
    def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t for name, t in tensors.items() if not name.endswith(lost)}

    path = changed(exported / "checkpoint.safetensors", tmp_path / "less.safetensors", without)
    with pytest.raises(UsageError, match="without"):
        read_layout(path)


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder.text_model.encoder.layers.1.mlp.fc1.bias",  # narrow copies have fewer layers, but whole ones
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight",
        "unet.down_blocks.2.resnets.0.conv_shortcut.bias",  # only where widths differ, but then with both
        "vae.decoder.conv_out.weight",
    ],
)
def test_a_tensor_less_is_refused_in_every_layout(name: str, exported: Path, tmp_path: Path) -> None:
    component, _, own = name.partition(".")
    single = next(n.single for n in SD15.names() if (n.component, n.canonical) == (component, own))

    def less(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert tensors.keys() & {single, own}
        return {name: tensor for name, tensor in tensors.items() if name not in (single, own)}

    with pytest.raises(UsageError, match=f"without {own}"):
        read_layout(changed(exported / "checkpoint.safetensors", tmp_path / "less.safetensors", less))
    folder = Path(shutil.copytree(exported / "diffusers", tmp_path / "folder"))
    file = next((folder / component).glob("*.safetensors"))
    changed(file, file, less)
    with pytest.raises(UsageError, match=f"lacks 1 tensor: {own}"):
        read_layout(folder)


def test_a_file_without_a_vae_is_a_checkpoint_without_one(exported: Path, tmp_path: Path) -> None:
    def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t for name, t in tensors.items() if not name.startswith("first_stage_model.")}

    path = changed(exported / "checkpoint.safetensors", tmp_path / "less.safetensors", without)
    assert set(read_layout(path).shapes()) == {"unet", "text_encoder"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("last", "found"), [(0.0047, None), (4.8e-8, True)])
def test_a_noise_schedule_that_ends_in_noise_is_a_fact(
    dtype: torch.dtype, last: float, found: bool | None, exported: Path, tmp_path: Path
) -> None:
    """Programs that load such a file whole draw with the table that is in it."""
    table = torch.linspace(0.999, last, 1000, dtype=torch.float64).to(dtype)
    path = changed(
        exported / "checkpoint.safetensors", tmp_path / "x.safetensors", lambda t: t | {"alphas_cumprod": table}
    )
    assert read_layout(path).facts.get("zero_terminal_snr") is found


@pytest.mark.parametrize(
    ("marker", "fact", "value"), [("v_pred", "prediction", "v_prediction"), ("ztsnr", "zero_terminal_snr", True)]
)
def test_markers_state_facts_and_are_written_again(
    marker: str, fact: str, value: Any, exported: Path, tmp_path: Path
) -> None:
    path = changed(
        exported / "checkpoint.safetensors",
        tmp_path / "marked.safetensors",
        lambda tensors: tensors | {marker: torch.empty(0)},
    )
    marked = take(path)
    assert marked.artifact.facts[fact] == value
    again = export(tmp_path / "again", marked, ["checkpoint", "diffusers"], {})
    assert marker in load_file(again / "checkpoint.safetensors")
    assert take(again / "diffusers").artifact.digest == marked.artifact.digest


@pytest.mark.parametrize("layout", ["sharded", "variant", "short names", "old attention", "1×1 convolutions"])
def test_a_folder_may_be_laid_out_in_the_ways_of_the_last_years(
    layout: str, toy: Taken, exported: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported / "diffusers", tmp_path / "folder"))
    unet, vae = (folder / part / "diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
    text = folder / "text_encoder" / "model.safetensors"
    if layout == "sharded":
        tensors = load_file(unet)
        names, places = sorted(tensors), dict[str, str]()
        for i, part in enumerate((names[::2], names[1::2])):
            shard = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, unet.parent / shard)
            places |= dict.fromkeys(part, shard)
        unet.unlink()
        (unet.parent / f"{unet.name}.index.json").write_text(json.dumps({"weight_map": places}))
    elif layout == "variant":
        unet.rename(unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    elif layout == "short names":
        save_file({name.removeprefix("text_model."): t for name, t in load_file(text).items()}, text)
    else:
        old: dict[str, str] = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        found = {}
        for name, tensor in load_file(vae).items():
            if ".attentions.0.to_" in name:
                kept = tensor[..., None, None] if layout.startswith("1") and tensor.dim() == 2 else tensor
                new = next(new for new in old if f".{new}." in name)
                found[name if layout.startswith("1") else name.replace(new, old[new])] = kept.contiguous()
            else:
                found[name] = tensor
        save_file(found, vae)
    assert take(folder).artifact.digest == toy.artifact.digest


def test_a_shard_outside_the_folder_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported / "diffusers", tmp_path / "folder"))
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../secret.safetensors"}}))
    with pytest.raises(UsageError, match="names no files beside it"):
        read_layout(folder)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("unet/config.json", {"in_channels": 9}, "an inpainting checkpoint"),
        ("unet/config.json", {"in_channels": 3}, "in_channels = 3"),
        ("unet/config.json", {"attention_head_dim": [2, 4]}, "unet heads"),
        ("unet/config.json", {"norm_num_groups": "4"}, "unet groups"),
        ("vae/config.json", {"latent_channels": 16}, "latent_channels = 16"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "predicts 'sample'"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule"),
        ("unet/config.json", {"use_linear_projection": True, "class_embed_type": "timestep"}, "no family"),
        ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}, "a FLUX checkpoint"),
        ("transformer/config.json", {"_class_name": "SD3Transformer2DModel"}, "a Stable Diffusion 3 checkpoint"),
    ],
)
def test_a_configuration_of_another_architecture_is_refused(
    file: str, change: dict[str, Any], words: str, exported: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported / "diffusers", tmp_path / "folder"))
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | change))
    with pytest.raises(UsageError, match=words):
        read_layout(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\0", "[" * 100_000, '{"a": ' * 50_000])
def test_a_configuration_that_is_no_table_is_refused(text: str, exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported / "diffusers", tmp_path / "folder"))
    (folder / "vae" / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"vae/config\.json"):
        read_layout(folder)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_pickles_are_refused_without_being_opened(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a pickle, which could run code"):
        read_layout(tmp_path / f"not-even-there{suffix}")


def test_a_file_of_no_kind_is_refused_with_some_of_its_names(tmp_path: Path) -> None:
    save_file({"what.is": torch.ones(1), "this.then": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=r"no kind that is known here \(it holds this\.then, what\.is"):
        read_layout(tmp_path / "x.safetensors")


def test_every_name_of_the_family_is_written_where_it_is_read(exported: Path) -> None:
    single = {name.single: name for name in SD15.names()}
    found = load_file(exported / "checkpoint.safetensors")
    assert set(found) <= set(single)
    for part in PARTS:
        folder = load_file(next((exported / "diffusers" / part).glob("*.safetensors")))
        for name, tensor in found.items():
            if single[name].component == part:
                assert same_bytes(tensor.reshape(folder[single[name].canonical].shape), folder[single[name].canonical])
