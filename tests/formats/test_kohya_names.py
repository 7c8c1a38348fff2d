"""What kohya's LoRA files call modules: by family, in both spellings, and what they state of the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdforge.errors import UsageError
from sdforge.families import family, family_names
from sdforge.formats.kohya import kohya_metadata, kohya_names, kohya_tensors
from sdforge.formats.layout import read_layout
from tests.families.loras import Lora, random_lora
from tests.families.toys import CONFIGS, write_family
from tests.families.workbench import Taken, keep, same_bytes, take
from tests.formats.conftest import export

XL = family("sdxl")
# names that kohya's scripts and LyCORIS give modules of Stable Diffusion XL
WRITTEN = {
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    ),
    "unet.mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj": (
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj"
    ),
    "unet.up_blocks.1.attentions.0.proj_in": "lora_unet_output_blocks_3_1_proj_in",
    "unet.down_blocks.0.resnets.0.conv1": "lora_unet_input_blocks_1_0_in_layers_2",
    "unet.down_blocks.0.downsamplers.0.conv": "lora_unet_input_blocks_3_0_op",
    "unet.time_embedding.linear_1": "lora_unet_time_embed_0",
    "unet.add_embedding.linear_1": "lora_unet_label_emb_0_0",
    "unet.conv_in": "lora_unet_input_blocks_0_0",
    "unet.conv_out": "lora_unet_out_2",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "text_encoder_2.text_model.encoder.layers.1.self_attn.q_proj": (
        "lora_te2_text_model_encoder_layers_1_self_attn_q_proj"
    ),
}


@pytest.fixture(scope="module")
def large(toys: Path) -> Taken:
    return take(write_family(toys / "sdxl", "sdxl"))


@pytest.fixture(scope="module")
def lora(large: Taken) -> Lora:
    return random_lora(large, tuple(WRITTEN), alphas=(1.0,))


def kept(work: Path, lora: Lora) -> Taken:
    tensors = {f"{m}.lora_{side}": getattr(f, side) for m, f in lora.items() for side in ("up", "down")}
    return keep(work, {"lora": tensors}, kind="lora", facts={"alpha": 1.0}, name="sdxl")


def test_a_large_unets_modules_are_called_as_in_a_single_file() -> None:
    names = kohya_names(XL)
    assert {module: names[module] for module in WRITTEN} == WRITTEN


@pytest.mark.parametrize("name", family_names())
def test_no_two_modules_have_one_name(name: str) -> None:
    names = kohya_names(family(name))
    assert len(set(names.values())) == len(names)


def test_only_the_large_family_uses_those_names() -> None:
    assert [name for name in family_names() if family(name).sgm_names] == ["sdxl"]
    assert kohya_names(family("sd15"))["unet.conv_in"] == "lora_unet_conv_in"


def test_what_is_exported_has_those_names_and_is_read_again(large: Taken, lora: Lora, tmp_path: Path) -> None:
    ours = kept(tmp_path / "kept", lora)
    export(tmp_path / "out", large, ["loras"], {}, loras=[ours.given()])
    (path,) = (tmp_path / "out" / "loras").iterdir()
    assert {name.partition(".")[0] for name in load_file(path)} == set(WRITTEN.values())
    assert take(path).artifact.digest == ours.artifact.digest
    with safe_open(path, "pt") as file:
        stated = file.metadata()
    assert (stated["ss_base_model_version"], stated["ss_v2"]) == ("sdxl_base_v1-0", "False")
    assert stated["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert stated["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"


def test_diffusers_finds_every_layer_of_what_is_exported(large: Taken, lora: Lora, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    blocks = {m: f for m, f in lora.items() if ".transformer_blocks." in m}
    export(tmp_path / "out", large, ["loras"], {}, loras=[kept(tmp_path / "kept", blocks).given()])
    (path,) = (tmp_path / "out" / "loras").iterdir()
    config: Any = UNet2DConditionModel(**CONFIGS["sdxl"]["unet"]).config
    found, _ = StableDiffusionXLPipeline.lora_state_dict(path, unet_config=config)
    for module, factors in blocks.items():
        place, _, part = module.rpartition(".")
        names = f"{place}.processor.{part}_lora.down.weight", f"{module}.lora.down.weight"
        (down,) = [found[name] for name in names if name in found]
        assert torch.equal(down, factors.down)


def test_either_spelling_is_read_as_the_same_lora(large: Taken, lora: Lora, tmp_path: Path) -> None:
    ours = kept(tmp_path / "kept", lora)
    export(tmp_path / "out", large, ["loras"], {}, loras=[ours.given()])
    (path,) = (tmp_path / "out" / "loras").iterdir()
    modules = {kohya: module for module, kohya in WRITTEN.items()}
    renamed = {}
    for name, tensor in load_file(path).items():
        kohya, _, rest = name.partition(".")
        module = modules[kohya].replace(".", "_").removeprefix("unet_")
        renamed[f"lora_unet_{module}.{rest}" if kohya.startswith("lora_unet_") else name] = tensor
    assert "lora_unet_down_blocks_0_resnets_0_conv1.alpha" in renamed
    save_file(renamed, tmp_path / "renamed.safetensors")
    assert take(tmp_path / "renamed.safetensors").artifact.digest == ours.artifact.digest


def test_small_families_files_may_have_those_names_too(toy: Taken, tmp_path: Path) -> None:
    """LyCORIS wraps the single file's network where it is given one."""
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = random_lora(toy, (module,))[module]
    start = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    path = tmp_path / "x.safetensors"
    save_file({f"{start}.lora_up.weight": factors.up, f"{start}.lora_down.weight": factors.down}, path)
    assert same_bytes(take(path).tensors("lora")[f"{module}.lora_up"], factors.up)


def test_one_module_in_two_spellings_is_refused(toy: Taken, tmp_path: Path) -> None:
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = random_lora(toy, (module,))[module]
    starts = (
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    )
    tensors = {f"{s}.lora_{side}.weight": getattr(factors, side).clone() for s in starts for side in ("up", "down")}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=f"factors of {module} twice"):
        read_layout(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "facts", "version", "second"),
    [
        ("sd15", {}, "sd_v1", "False"),
        ("sd15", {"prediction": "v_prediction"}, "sd_v1_v", "False"),
        ("sd2", {}, "sd_v2", "True"),
        ("sd2", {"prediction": "v_prediction"}, "sd_v2_v", "True"),
        ("sdxl", {"prediction": "v_prediction"}, "sdxl_base_v1-0", "False"),
    ],
)
def test_a_lora_states_its_base_as_kohyas_scripts_do(name: str, facts: Any, version: str, second: str) -> None:
    factors = {"unet.conv_in.lora_down": ("F16", (4, 4, 3, 3)), "unet.conv_in.lora_up": ("F16", (8, 4))}
    found = kohya_metadata(family(name).base_version(facts), {}, {}, factors)
    assert (found["ss_base_model_version"], found["ss_v2"]) == (version, second)


def test_a_small_lora_of_v_prediction_states_it_in_modelspec(toys: Path, tmp_path: Path) -> None:
    base = take(write_family(toys / "sd2", "sd2"))
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    factors = random_lora(base, (module,))[module]
    tensors = {f"{module}.lora_up": factors.up, f"{module}.lora_down": factors.down}
    ours = keep(tmp_path / "kept", {"lora": tensors}, kind="lora", name="sd2")
    export(tmp_path / "out", base, ["loras"], {}, loras=[ours.given()])
    (path,) = (tmp_path / "out" / "loras").iterdir()
    with safe_open(path, "pt") as file:
        stated = file.metadata()
    assert stated["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert stated["modelspec.implementation"] == "diffusers"
    assert (stated["modelspec.prediction_type"], stated["ss_base_model_version"]) == ("v", "sd_v2_v")


def test_ranks_that_differ_are_called_dynamic() -> None:
    """Rank 8 here and 4 there, as resizing by energy leaves them; kohya's own scripts write the same word."""
    factors = {}
    for place, rank in (("to_q", 8), ("to_k", 4)):
        module = f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.{place}"
        factors |= {f"{module}.lora_down": ("F16", (rank, 16)), f"{module}.lora_up": ("F16", (16, rank))}
    found = kohya_metadata("sd_v1", {}, {}, factors)
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert json.loads(found["ss_network_args"]) is None


@pytest.mark.parametrize(
    ("facts", "alpha", "conv_alpha"),
    [
        ({}, "8.0", "4.0"),
        ({"alpha": 2.0}, "2.0", "2.0"),
        ({"alpha": {"to_q": 4.0, "conv1": 1.0, "conv2": 1.0}}, "4.0", "1.0"),
        ({"alpha": {"to_q": 4.0, "conv1": 1.0, "conv2": 2.0}}, "4.0", None),
    ],
)
def test_convolutions_have_rank_and_alpha_of_their_own(facts: Any, alpha: str, conv_alpha: str | None) -> None:
    """As `networks.lora` is told them: network_args `conv_dim=4`, `conv_alpha=1`. 1×1 ones count as matrices."""
    attention, resnet = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.", "unet.mid_block.resnets.0."
    modules = {"to_q": attention + "to_q", "conv1": resnet + "conv1", "conv2": resnet + "conv2"}
    factors = {}
    for name, module in modules.items():
        rank, kernel = (8, ()) if name == "to_q" else (4, (3, 3))
        factors |= {f"{module}.lora_down": ("F16", (rank, 16, *kernel)), f"{module}.lora_up": ("F16", (16, rank))}
    if isinstance(facts.get("alpha"), dict):
        facts = {"alpha": {modules[name]: value for name, value in facts["alpha"].items()}}
    found = kohya_metadata("sd_v1", {}, facts, factors)
    assert (found["ss_network_module"], found["ss_network_dim"]) == ("networks.lora", "8")
    assert found["ss_network_alpha"] == alpha
    arguments = {"conv_dim": "4"} | ({"conv_alpha": conv_alpha} if conv_alpha else {})
    assert json.loads(found["ss_network_args"]) == arguments


AROUND = "unet.down_blocks.0.attentions.0.proj_in"
ASKED = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize(("name", "context"), [("sd15", 768), ("sd2", 1024)])
@pytest.mark.parametrize("kernel", [(), (1, 1)])
@pytest.mark.parametrize("told", ["width", "metadata"])
def test_a_layer_that_is_trained_as_another_kind_does_not_make_another_family(
    name: str, context: int, kernel: tuple[int, ...], told: str, tmp_path: Path
) -> None:
    """kohya's scripts held what is around attention as convolutions, of Stable Diffusion 2 too."""
    inner = {AROUND: 8} | ({ASKED: context} if told == "width" else {})
    tensors = {}
    for module, width in inner.items():
        more = kernel if module == AROUND else ()
        for side, shape in (("up", (8, 2, *more)), ("down", (2, width, *more))):
            tensors[f"{kohya_names(family(name))[module]}.lora_{side}.weight"] = torch.ones(shape)
    stated = {"ss_base_model_version": family(name).kohya_version} if told == "metadata" else {}
    save_file(tensors, tmp_path / "x.safetensors", stated)
    assert read_layout(tmp_path / "x.safetensors").family == name


@pytest.mark.parametrize(("name", "kernel"), [("sd15", (1, 1)), ("sd2", (1, 1)), ("unclip", (1, 1)), ("sdxl", ())])
def test_plain_factors_have_the_shapes_of_the_layers_that_kohyas_scripts_have(
    name: str, kernel: tuple[int, ...]
) -> None:
    """Of Stable Diffusion 2 too they hold what is around attention as convolutions, and refuse matrices for those."""
    around, text = "unet.mid_block.attentions.0.proj_out", "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    factors = {}
    for module in (around, ASKED.replace("down_blocks.0", "down_blocks.1"), text):
        factors |= {f"{module}.lora_down": ("F16", (2, 8)), f"{module}.lora_up": ("F16", (8, 2))}
        factors |= {f"{module}.dora_scale": ("F16", (8, 1))}
    written, names = kohya_tensors(family(name), factors, {}).shapes, kohya_names(family(name))
    four = {kohya for kohya, (_, shape) in written.items() if len(shape) == 4}
    lengths = {f"{names[around]}.dora_scale"} if name == "sd15" else set()
    assert four == ({f"{names[around]}.lora_{side}.weight" for side in ("up", "down")} | lengths if kernel else set())
    assert all(shape[2:] == kernel for kohya, (_, shape) in written.items() if kohya in four)


NORMED = "unet.down_blocks.0.resnets.0.norm1"


@pytest.mark.parametrize(("half", "other"), [("w_norm", "b_norm"), ("b_norm", "w_norm")])
def test_half_a_norms_difference_is_written_with_zeros_for_the_other(half: str, other: str) -> None:
    """A1111 reads no file with the one alone, and ComfyUI no norm's bias without a weight."""
    file = kohya_tensors(family("sd15"), {f"{NORMED}.{half}": ("F16", (8,))}, {})
    name = f"{kohya_names(family('sd15'))[NORMED]}.{other}"
    assert (file.shapes[name], file.constant[name]) == (("F16", (8,)), bytes(16))
    whole = kohya_tensors(family("sd15"), {f"{NORMED}.{each}": ("F16", (8,)) for each in (half, other)}, {})
    assert not whole.constant


def test_a_biass_difference_alone_is_written_beside_a_lora_that_changes_nothing(toy: Taken, tmp_path: Path) -> None:
    """A1111 and InvokeAI read no file in which a module has nothing else."""
    conv, linear = "unet.down_blocks.0.resnets.0.conv1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    shapes = {f"{c}.{ref.name}": ref.shape for c, refs in toy.given().components.items() for ref in refs}
    tensors = {f"{module}.diff_b": torch.ones(shapes[f"{module}.bias"]) for module in (conv, linear)}
    factors = random_lora(toy, (linear,))[linear]
    tensors |= {f"{linear}.lora_up": factors.up, f"{linear}.lora_down": factors.down}
    ours = keep(tmp_path / "kept", {"lora": tensors}, kind="lora", name="sd15")
    export(tmp_path / "out", toy, ["loras"], {}, loras=[ours.given()])
    (path,) = (tmp_path / "out" / "loras").iterdir()
    found, name = load_file(path), kohya_names(family("sd15"))[conv]
    out, *columns = shapes[f"{conv}.weight"]
    assert found[f"{name}.lora_down.weight"].shape == (1, *columns)
    assert found[f"{name}.lora_up.weight"].shape == (out, 1, 1, 1)
    assert not found[f"{name}.lora_up.weight"].any()
    assert {f.rpartition(".")[2] for f in take(path).tensors("lora") if f.startswith(conv)} == {
        "lora_up",
        "lora_down",
        "diff_b",
    }


@pytest.mark.parametrize(
    "spelled",
    [
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te_encoder_layers_0_mlp_fc1",
        "lora_te1_encoder_layers_0_mlp_fc1",
        "lycoris_text_model_encoder_layers_0_mlp_fc1",
        "lycoris_encoder_layers_0_mlp_fc1",
    ],
)
def test_a_text_encoders_names_as_programs_begin_them(spelled: str, toy: Taken, tmp_path: Path) -> None:
    """Diffusers numbers every first text encoder; transformers has no `text_model.` since its version 5."""
    modules = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "lora_unet_input_blocks_1_1_"
        "transformer_blocks_0_attn1_to_q",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": spelled,
    }
    found = random_lora(toy, tuple(modules))
    tensors = {
        f"{modules[m]}.lora_{side}.weight": getattr(f, side) for m, f in found.items() for side in ("up", "down")
    }
    save_file(tensors, tmp_path / "x.safetensors")
    assert {name.rpartition(".")[0] for name in take(tmp_path / "x.safetensors").tensors("lora")} == set(modules)


def test_of_modules_that_no_family_has_together_those_are_named_that_are_too_many(tmp_path: Path) -> None:
    names = [f"lora_te{i}_text_model_encoder_layers_0_mlp_fc1" for i in (1, 2)] + ["lora_unet_no_such_layer"]
    save_file({f"{name}.lora_up.weight": torch.ones(4, 1) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=r"modules of Stable Diffusion XL and for others.*: lora_unet_no_such_layer"):
        read_layout(tmp_path / "x.safetensors")


@pytest.mark.parametrize("side", ["up", "down"])
def test_a_factor_without_numbers_is_refused(side: str, tmp_path: Path) -> None:
    shapes = {"up": (8, 0 if side == "up" else 2), "down": (0 if side == "down" else 2, 8)}
    name = kohya_names(family("sd15"))[AROUND]
    save_file({f"{name}.lora_{s}.weight": torch.ones(shape) for s, shape in shapes.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=f"a factor of {AROUND} without numbers: lora_{side}"):
        read_layout(tmp_path / "x.safetensors")


def test_what_comfyui_writes_itself_has_dots(large: Taken, tmp_path: Path) -> None:
    """Its node LoraSave: the single file's names of the U-Net, and transformers' of the text encoders."""
    text, query = "transformer.text_model.encoder.layers", "self_attn.q_proj"
    spelled = {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
            "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q"
        ),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": f"text_encoders.clip_l.{text}.0.mlp.fc1",
        f"text_encoder_2.text_model.encoder.layers.1.{query}": f"text_encoders.clip_g.{text}.1.{query}",
    }
    lora = random_lora(large, tuple(spelled))
    tensors = {f"{spelled[m]}.lora_{side}.weight": getattr(f, side) for m, f in lora.items() for side in ("up", "down")}
    bias = "diffusion_model.input_blocks.0.0"
    save_file(tensors | {f"{bias}.diff_b": torch.ones(8)}, tmp_path / "x.safetensors")
    found, layout = take(tmp_path / "x.safetensors").tensors("lora"), read_layout(tmp_path / "x.safetensors")
    assert (layout.family, layout.dialect) == ("sdxl", "ComfyUI")
    assert all(
        same_bytes(found[f"{m}.lora_{side}"], getattr(f, side)) for m, f in lora.items() for side in ("up", "down")
    )
    assert same_bytes(found["unet.conv_in.diff_b"], torch.ones(8))


def test_of_another_architecture_comfyuis_files_are_refused_by_its_name(tmp_path: Path) -> None:
    save_file(
        {"diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight": torch.ones(4, 1)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(UsageError, match="a LoRA for FLUX"):
        read_layout(tmp_path / "x.safetensors")


def test_a_network_that_comfyui_keeps_alone_is_no_lora(tmp_path: Path) -> None:
    names = ("weight", "bias")
    save_file({f"diffusion_model.input_blocks.0.0.{n}": torch.ones(4, 1) for n in names}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="of no kind that is known"):
        read_layout(tmp_path / "x.safetensors")
