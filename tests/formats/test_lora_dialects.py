"""LoRA's relatives in the files of many programs: LyCORIS, kohya's OFT, diffusers old and new, PEFT, cloneofsimo."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdforge.errors import UsageError
from sdforge.formats.cloneofsimo import places
from sdforge.formats.kohya import kohya_names
from sdforge.formats.layout import read_layout
from tests.edits.test_bake_forms import ALL, FLAT, KERNEL, NARROW, shape
from tests.families.forms import WIDE, Case, random_factors
from tests.families.loras import LINEAR, TEXT, random_lora
from tests.families.workbench import SD15, Taken, keep, same_bytes, take
from tests.formats.conftest import export

KOHYA = {name: case for name, case in ALL.items() if not name.startswith("oft of inputs")}
NAMES = kohya_names(SD15)
OF_KERNELS = {"conv_dim": "3", "conv_alpha": "1.5"}


def weights(toy: Taken) -> dict[str, Tensor]:
    return {f"unet.{name}": tensor for name, tensor in toy.tensors("unet").items()}


def made(name: str, toy: Taken, work: Path) -> Taken:
    """Return a LoRA of one form as a training or a reader leaves it."""
    case: Case = ALL[name]
    modules = (KERNEL,) if name in WIDE else (FLAT, NARROW, KERNEL)
    tensors = {
        f"{module}.{factor}": tensor.half()
        for module in modules
        for factor, tensor in random_factors(case, shape(weights(toy), module)).items()
    }
    facts = {"alpha": case.alpha} if case.alpha else {}
    return keep(work, {"lora": tensors}, kind="lora", facts=facts | case.facts)


def exported(lora: Taken, toy: Taken, work: Path) -> Path:
    export(work, toy, ["loras"], {}, loras=[lora.given()])
    (path,) = (work / "loras").iterdir()
    return path


@pytest.mark.parametrize("name", KOHYA)
def test_every_form_is_written_and_read_again_as_the_same(name: str, toy: Taken, tmp_path: Path) -> None:
    lora = made(name, toy, tmp_path / "made")
    again = take(exported(lora, toy, tmp_path / "out"))
    assert again.artifact.facts == lora.artifact.facts
    assert again.artifact.digest == lora.artifact.digest


@pytest.mark.parametrize(
    ("name", "module", "arguments"),
    [
        ("lora", "networks.lora", OF_KERNELS),
        ("loha", "lycoris.kohya", {"algo": "loha"} | OF_KERNELS),
        ("lokr, the first whole", "lycoris.kohya", {"algo": "lokr"} | OF_KERNELS),
        ("dora of rows", "lycoris.kohya", {"algo": "locon", "dora_wd": "True"} | OF_KERNELS),
        ("boft", "lycoris.kohya", {"algo": "diag-oft"}),
    ],
)
def test_metadata_names_the_network_that_makes_it(
    name: str, module: str, arguments: dict[str, str] | None, toy: Taken, tmp_path: Path
) -> None:
    with safe_open(exported(made(name, toy, tmp_path / "made"), toy, tmp_path / "out"), "pt") as file:
        found = file.metadata()
    assert (found["ss_network_module"], json.loads(found["ss_network_args"])) == (module, arguments)


def test_a_lokr_of_whole_factors_says_so(toy: Taken, tmp_path: Path) -> None:
    path = exported(made("lokr, both factors whole", toy, tmp_path / "made"), toy, tmp_path / "out")
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_network_dim"] == "10000"
    assert {float(t) for n, t in load_file(path).items() if n.endswith(".alpha")} == {1.0}  # LyCORIS wants one
    assert take(path).artifact.facts == {}


def test_lycoris_shapes_are_those_that_it_reads(toy: Taken, tmp_path: Path) -> None:
    """Of 1×1 convolutions, factors have two dimensions more, except where LyCORIS keeps matrices."""
    found: dict[str, tuple[int, ...]] = {}
    for i, name in enumerate(
        ("dora of rows", "loha", "lokr, the first whole", "lokr, the second whole", "ia3 of rows")
    ):
        path = exported(made(name, toy, tmp_path / f"made{i}"), toy, tmp_path / f"out{i}")
        found |= {
            n.partition(".")[2]: tuple(t.shape) for n, t in load_file(path).items() if n.startswith(NAMES[NARROW])
        }
    assert found == {
        "alpha": (),
        "dora_scale": (16, 1, 1, 1),
        "hada_w1_a": (16, 3),
        "hada_w1_b": (3, 16),
        "hada_w2_a": (16, 3),
        "hada_w2_b": (3, 16),
        "lokr_w1": (4, 2),
        "lokr_w1_a": (4, 3),
        "lokr_w1_b": (3, 2),
        "lokr_w2": (4, 8, 1, 1),
        "lokr_w2_a": (4, 3),
        "lokr_w2_b": (3, 8),
        "lora_down.weight": (3, 16, 1, 1),
        "lora_up.weight": (16, 3, 1, 1),
        "on_input": (),
        "weight": (16, 1, 1, 1),
    }


def test_what_no_such_file_can_say_is_not_exported(toy: Taken, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="turned on the side of its inputs"):
        exported(made("oft of inputs", toy, tmp_path / "made"), toy, tmp_path / "out")


def saved(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata or {})
    return path


def test_modules_may_begin_as_lycoris_and_kohyas_oft_begin_them(tmp_path: Path) -> None:
    blocks = torch.randn(16, 4, 4)
    for start in ("lora_unet_", "lycoris_", "oft_unet_"):
        name = start + NAMES[FLAT].removeprefix("lora_unet_")
        path = saved(
            tmp_path / f"{start}.safetensors", {f"{name}.oft_blocks": blocks, f"{name}.alpha": torch.tensor(0.0)}
        )
        taken = take(path)
        assert torch.equal(taken.tensors("lora")[f"{FLAT}.oft_blocks"], blocks)
        assert taken.artifact.facts == {}


def test_norms_biases_and_inputs_are_told_apart(tmp_path: Path) -> None:
    norm = "unet.down_blocks.0.attentions.0.norm"
    tensors = {
        f"{NAMES[norm]}.w_norm": torch.ones(8),
        f"{NAMES[norm]}.b_norm": torch.ones(8),
        f"{NAMES[FLAT]}.weight": torch.ones(8),
        f"{NAMES[FLAT]}.on_input": torch.tensor(1),
        f"{NAMES[NARROW]}.weight": torch.ones(1, 16, 1, 1),
        f"{NAMES[NARROW]}.on_input": torch.tensor(0),
        f"{NAMES[TEXT]}.diff_b": torch.ones(32),
    }
    shapes = {n: tuple(t.shape) for n, t in take(saved(tmp_path / "x.safetensors", tensors)).tensors("lora").items()}
    assert shapes == {
        f"{norm}.w_norm": (8,),
        f"{norm}.b_norm": (8,),
        f"{FLAT}.ia3": (1, 8),
        f"{NARROW}.ia3": (16, 1),
        f"{TEXT}.diff_b": (32,),
    }


def test_a_factor_in_two_spellings_is_refused(tmp_path: Path) -> None:
    twice = {NAMES[FLAT]: torch.ones(64, 8), f"lycoris_{NAMES[FLAT].removeprefix('lora_unet_')}": torch.zeros(64, 8)}
    with pytest.raises(UsageError, match="twice, in two spellings"):
        read_layout(saved(tmp_path / "x.safetensors", {f"{name}.diff": tensor for name, tensor in twice.items()}))


def test_alphas_may_be_stated_of_some_modules_only(toy: Taken, tmp_path: Path) -> None:
    loha = random_factors(ALL["loha"], (64, 8))
    up, down, _ = random_lora(toy, (LINEAR,))[LINEAR]
    tensors = {f"{NAMES[FLAT]}.{n}": f for n, f in loha.items()}
    tensors |= {f"{NAMES[LINEAR]}.lora_up.weight": up, f"{NAMES[LINEAR]}.lora_down.weight": down}
    tensors[f"{NAMES[FLAT]}.alpha"] = torch.tensor(0.5)
    facts = take(saved(tmp_path / "x.safetensors", tensors)).artifact.facts
    assert facts == {"alpha": {FLAT: 0.5, LINEAR: 2.0}}


def test_embeddings_that_come_with_a_lora_are_passed_over_and_said(toy: Taken, tmp_path: Path) -> None:
    up, down, _ = random_lora(toy, (LINEAR,))[LINEAR]
    tensors = {f"{NAMES[LINEAR]}.lora_up.weight": up, f"{NAMES[LINEAR]}.lora_down.weight": down}
    bundle = {"bundle_emb.word.emb_params": torch.ones(2, 16)}
    layout = read_layout(saved(tmp_path / "x.safetensors", tensors | bundle))
    assert {t.name for t in layout.tensors} == {f"{LINEAR}.lora_up", f"{LINEAR}.lora_down"}
    ((reason, count),) = layout.passed.items()
    assert "embedding" in reason
    assert count == 1
    assert layout.notes["embeddings"] == ["word"]


@pytest.mark.parametrize("start", ["unet.", ""])
def test_attention_processors_of_old_diffusers_are_read(start: str, toy: Taken, tmp_path: Path) -> None:
    attention = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    modules = tuple(f"{attention}.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0"))
    lora = random_lora(toy, modules)
    tensors: dict[str, Tensor] = {}
    for module, factors in lora.items():
        part = module.removeprefix(f"{attention}.").removesuffix(".0")
        name = f"{start}{attention.removeprefix('unet.')}.processor.{part}_lora"
        tensors |= {f"{name}.up.weight": factors.up, f"{name}.down.weight": factors.down}
    found = take(saved(tmp_path / "x.safetensors", tensors))
    assert found.artifact.facts == {}
    assert all(same_bytes(found.tensors("lora")[f"{m}.lora_up"], f.up) for m, f in lora.items())


def test_the_text_encoders_oldest_and_old_names_are_read(toy: Taken, tmp_path: Path) -> None:
    layer = "text_encoder.text_model.encoder.layers.1.self_attn"
    up, down, _ = random_lora(toy, (f"{layer}.q_proj",))[f"{layer}.q_proj"]
    spellings = (
        f"{layer}.to_q_lora.{{}}.weight",
        f"{layer}.q_proj.lora_linear_layer.{{}}.weight",
        f"{layer.replace('text_model.', '')}.q_proj.lora.{{}}.weight",
    )
    for i, spelling in enumerate(spellings):
        path = saved(tmp_path / f"{i}.safetensors", {spelling.format("up"): up, spelling.format("down"): down})
        assert set(take(path).tensors("lora")) == {f"{layer}.q_proj.lora_up", f"{layer}.q_proj.lora_down"}


def test_what_stock_diffusers_saves_of_a_dora_is_read_whole(toy: Taken, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    folder = export(tmp_path / "base", toy, ["diffusers"], {}) / "diffusers"
    network = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32).unet
    where = [m.removeprefix("unet.") for m in (LINEAR, KERNEL)]
    network.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=where, use_dora=True, init_lora_weights=False))
    layers, metadata = get_peft_model_state_dict(network), _collate_lora_metadata({"unet": network})
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **metadata)
    taken = take(tmp_path / "pytorch_lora_weights.safetensors")
    shapes = {n: tuple(t.shape) for n, t in taken.tensors("lora").items() if n.endswith("dora_scale")}
    assert shapes == {f"{LINEAR}.dora_scale": (8, 1), f"{KERNEL}.dora_scale": (16, 1)}
    assert taken.artifact.facts == {"alpha": 3.0}


def peft_folder(work: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    (work / "adapter_config.json").write_text(json.dumps(config))
    saved(work / "adapter_model.safetensors", {f"base_model.model.{n}": t for n, t in tensors.items()})
    return work


def plain_tensors(toy: Taken, module: str = LINEAR) -> dict[str, Tensor]:
    up, down, _ = random_lora(toy, (module,))[module]
    name = module.partition(".")[2].removeprefix("text_model.")
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


@pytest.mark.parametrize("module", [LINEAR, TEXT])
def test_pefts_folder_says_which_network_it_is_of_by_its_modules(module: str, toy: Taken, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "init_lora_weights": True}
    taken = take(peft_folder(tmp_path, config, plain_tensors(toy, module)))
    assert set(taken.tensors("lora")) == {f"{module}.lora_down", f"{module}.lora_up"}
    assert taken.artifact.facts == {"alpha": 1.0}


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"peft_type": "VERA"}, "adapter of kind VERA"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}, "began as pissa_niter_4"),
        ({"peft_type": "LORA", "init_lora_weights": "OLoRA"}, "began as OLoRA"),
        ({"peft_type": "LORA", "alora_invocation_tokens": [7]}, "an activated LoRA"),
        ({"peft_type": "OFT", "coft": True}, "constrained OFT"),
    ],
)
def test_adapters_that_would_be_misunderstood_are_refused(
    config: dict[str, Any], sentence: str, toy: Taken, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=sentence):
        read_layout(peft_folder(tmp_path, config, plain_tensors(toy)))


def test_a_beginning_that_leaves_the_checkpoint_alone_is_read(toy: Taken, tmp_path: Path) -> None:
    """EVA fills one factor from the data, and zeros the other."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "init_lora_weights": "eva"}
    assert len(take(peft_folder(tmp_path, config, plain_tensors(toy))).tensors("lora")) == 2


def test_a_file_of_pefts_without_its_configuration_does_not_know_its_alpha(toy: Taken, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path, {}, plain_tensors(toy))
    with pytest.raises(UsageError, match=re.escape("does not state its alpha, which lies in adapter_config.json")):
        read_layout(folder / "adapter_model.safetensors")


def test_whole_factors_that_peft_scales_all_the_same_are_refused(tmp_path: Path) -> None:
    tensors = {
        f"{FLAT.removeprefix('unet.')}.{n}": f
        for n, f in random_factors(ALL["lokr, both factors whole"], (64, 8)).items()
    }
    with pytest.raises(UsageError, match="scales whole factors"):
        read_layout(peft_folder(tmp_path / "a", {"peft_type": "LOKR", "r": 8, "alpha": 4}, tensors))
    own = {"rank_pattern": {FLAT.rpartition(".")[2]: 16}}
    with pytest.raises(UsageError, match="scales whole factors"):
        read_layout(peft_folder(tmp_path / "b", {"peft_type": "LOKR", "r": 8, "alpha": 8} | own, tensors))
    for i, config in enumerate([{"alpha": 8}, {"alpha": 16} | own]):
        folder = peft_folder(tmp_path / f"c{i}", {"peft_type": "LOKR", "r": 8} | config, tensors)
        assert take(folder).artifact.facts == {}


def test_cloneofsimos_numbers_are_places_in_a_walk(toy: Taken, tmp_path: Path) -> None:
    """The first is of the way down, the last of the middle, and the feed-forward layer stands between attentions."""
    walk = {component: places(SD15, component) for component in ("unet", "text_encoder")}
    assert (len(walk["unet"]), len(walk["text_encoder"])) == (144, 48)
    assert walk["unet"][0] == LINEAR
    assert walk["unet"][4].endswith("down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj")
    assert walk["unet"][-1] == "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    assert walk["unet"][54].startswith("unet.up_blocks.1.attentions.0.")
    assert walk["text_encoder"][5].endswith("layers.1.self_attn.v_proj")
    chosen = {"unet": (0, 4, 143), "text_encoder": (5,)}
    tensors: dict[str, Tensor] = {}
    lora = random_lora(toy, tuple(walk[c][i] for c, own in chosen.items() for i in own))
    for component, own in chosen.items():
        for i in own:
            factors = lora[walk[component][i]]
            tensors |= {f"{component}:{i}:up": factors.up, f"{component}:{i}:down": factors.down}
    classes = {"unet": '["CrossAttention", "Attention", "GEGLU"]', "text_encoder": '["CLIPAttention"]'}
    word = {"<word>": torch.ones(16)}
    path = saved(tmp_path / "x.safetensors", tensors | word, classes | {"<word>": "<embed>"})
    taken = take(path)
    assert taken.artifact.facts == {}
    assert all(same_bytes(taken.tensors("lora")[f"{m}.lora_down"], f.down) for m, f in lora.items())
    assert len(taken.tensors("lora")) == 2 * len(lora)
    assert sum(read_layout(path).passed.values()) == 1


def test_cloneofsimos_files_of_a_later_diffusers_have_the_feed_forward_layer_last(toy: Taken, tmp_path: Path) -> None:
    """The same numbers, and no word of it in the file: in the place of that layer stands a square matrix's update."""
    walk = places(SD15, "unet", later=True)
    assert walk[4].endswith("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q")
    assert walk[8].endswith("down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj")
    assert sorted(walk) == sorted(places(SD15, "unet"))
    lora = random_lora(toy, tuple(walk[i] for i in (0, 4, 5, 8, 143)))
    tensors = {f"unet:{walk.index(m)}:{side}": getattr(f, side) for m, f in lora.items() for side in ("up", "down")}
    taken = take(saved(tmp_path / "x.safetensors", tensors, {"unet": '["CrossAttention", "Attention", "GEGLU"]'}))
    assert {name.rpartition(".")[0] for name in taken.tensors("lora")} == set(lora)
    assert all(same_bytes(taken.tensors("lora")[f"{m}.lora_up"], f.up) for m, f in lora.items())


def test_the_first_of_cloneofsimos_files_count_attention_alone(toy: Taken, tmp_path: Path) -> None:
    walk = places(SD15, "unet", fed=False)
    assert walk[4].endswith("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q")
    lora = random_lora(toy, (walk[4], walk[127]))
    tensors = {f"unet:{i}:{side}": getattr(lora[walk[i]], side) for i in (4, 127) for side in ("up", "down")}
    path = saved(tmp_path / "x.safetensors", tensors, {"unet": '["CrossAttention", "Attention"]'})
    assert {name.rpartition(".")[0] for name in take(path).tensors("lora")} == set(lora)


def test_cloneofsimos_other_layers_are_not_guessed_at(toy: Taken, tmp_path: Path) -> None:
    up, down, _ = random_lora(toy, (LINEAR,))[LINEAR]
    tensors = {"unet:0:up": up, "unet:0:down": down}
    with pytest.raises(UsageError, match="counts other layers of unet"):
        read_layout(saved(tmp_path / "x.safetensors", tensors, {"unet": '["ResnetBlock2D"]'}))
    beyond = {"unet:99999:up": up, "unet:99999:down": down}
    with pytest.raises(UsageError, match="more layers than any family"):
        read_layout(saved(tmp_path / "y.safetensors", beyond))
