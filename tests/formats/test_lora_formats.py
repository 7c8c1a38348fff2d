"""LoRA files of kohya's and diffusers' kind: read alike, written as kohya's, loaded by stock diffusers."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdforge.errors import UsageError
from sdforge.formats.kohya import LEGACY, Body, hashes, kohya_names
from sdforge.formats.layout import read_layout
from sdforge.formats.lora import alpha_of
from sdforge.formats.safetensors import header_bytes, read_header, read_number
from tests.families.loras import LINEAR, MODULES, TEXT, WIDE, Factors, Lora, kept_lora, live, random_lora, write_kohya
from tests.families.workbench import SD15, Taken, same_bytes, take
from tests.formats.conftest import export


@pytest.fixture(scope="module")
def lora(toy: Taken) -> Lora:
    return random_lora(toy, alphas=(1.0, 2.0, 0.5))


@pytest.fixture(scope="module")
def even(toy: Taken) -> Lora:
    """One alpha for all: diffusers' reader of kohya files goes wrong where alphas differ."""
    return random_lora(toy, alphas=(1.0,))


def exported_lora(work: Path, toy: Taken, lora: Lora, **settings: Any) -> Path:
    kept = kept_lora(work / "kept", lora)
    export(work / "out", toy, ["loras"], settings, loras=[kept.given()])
    (path,) = (work / "out" / "loras").iterdir()
    return path


def same(taken: Taken, lora: Lora) -> bool:
    tensors, facts = taken.tensors("lora"), taken.artifact.facts
    assert len(tensors) == 2 * len(lora)
    return all(
        same_bytes(tensors[f"{m}.lora_up"], f.up)
        and same_bytes(tensors[f"{m}.lora_down"], f.down)
        and alpha_of(facts, m, f.down.shape[0]) == f.alpha
        for m, f in lora.items()
    )


def test_a_kohya_file_is_read_whole(lora: Lora, tmp_path: Path) -> None:
    taken = take(write_kohya(tmp_path / "x.safetensors", lora))
    assert taken.artifact.kind == "lora"
    assert same(taken, lora)


def test_what_we_export_is_what_kohya_would_write(lora: Lora, toy: Taken, tmp_path: Path) -> None:
    ours = load_file(exported_lora(tmp_path, toy, lora))
    theirs = load_file(write_kohya(tmp_path / "x.safetensors", lora))
    assert set(ours) == set(theirs)
    assert all(same_bytes(ours[name], theirs[name]) for name in ours)


def test_export_and_reading_give_the_same_lora(lora: Lora, toy: Taken, tmp_path: Path) -> None:
    taken = take(exported_lora(tmp_path, toy, lora))
    assert same(taken, lora)
    assert taken.artifact.digest == kept_lora(tmp_path / "again", lora).artifact.digest


def test_alpha_is_the_rank_where_a_file_states_none(toy: Taken, tmp_path: Path) -> None:
    plain = random_lora(toy, (LINEAR,), alphas=(2.0,))
    taken = take(write_kohya(tmp_path / "x.safetensors", plain, alpha=False))
    assert taken.artifact.facts == {}
    assert same(taken, plain)


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64],
)
def test_alpha_may_be_stored_in_any_type(dtype: torch.dtype, toy: Taken, tmp_path: Path) -> None:
    path = write_kohya(tmp_path / "x.safetensors", random_lora(toy, (LINEAR,)))
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith(".alpha"))
    save_file(tensors | {name: torch.tensor(1.5, dtype=dtype)}, path)
    assert take(path).artifact.facts == {"alpha": 1.5}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
def test_every_number_of_8_and_16_bits_is_read_as_torch_reads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    size, step = dtype.itemsize, 1 if dtype.itemsize == 1 else 257
    bits = torch.arange(0, 256**size, step).to(torch.uint8 if size == 1 else torch.uint16)
    save_file({"x": bits.view(dtype)}, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    entry = header.tensors["x"]
    found = [read_number(header, entry.dtype, entry.offset + i * size) for i in range(len(bits))]
    assert torch.allclose(torch.tensor(found), bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


def diffusers_file(path: Path, lora: Lora, metadata: dict[str, Any], *, old: bool = False) -> Path:
    up, down = (".lora.up.weight", ".lora.down.weight") if old else (".lora_B.weight", ".lora_A.weight")
    tensors: dict[str, Tensor] = {}
    for module, factors in lora.items():
        conv = SD15.is_conv(module)
        kernel = factors.down if factors.down.dim() == 4 or not conv else factors.down[..., None, None]
        tensors |= {module + up: factors.up[..., None, None] if conv else factors.up, module + down: kernel}
    stated = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else {}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, stated)
    return path


@pytest.mark.parametrize("old", [False, True])
def test_a_diffusers_file_is_read_as_the_same_lora(old: bool, even: Lora, tmp_path: Path) -> None:
    stated = {"unet.lora_alpha": 1.0, "text_encoder.lora_alpha": 1.0}
    taken = take(diffusers_file(tmp_path / "x.safetensors", even, stated, old=old))
    assert same(taken, even)
    assert taken.artifact.digest == take(write_kohya(tmp_path / "k.safetensors", even)).artifact.digest


def test_what_stock_diffusers_saves_is_read_with_its_alpha(toy: Taken, tmp_path: Path) -> None:
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    network = pipeline_of(tmp_path, toy).unet
    network.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "proj_in"], init_lora_weights=False))
    layers, metadata = get_peft_model_state_dict(network), _collate_lora_metadata({"unet": network})
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **metadata)
    taken = take(tmp_path / "pytorch_lora_weights.safetensors")
    assert taken.artifact.facts == {"alpha": 3.0}
    theirs = {n: t for n, t in network.state_dict().items() if "lora_A" in n}
    ours = {n: t for n, t in taken.tensors("lora").items() if n.endswith("lora_down")}
    assert len(ours) == len(theirs) == 48
    name = LINEAR.removeprefix("unet.")
    assert torch.equal(ours[f"{LINEAR}.lora_down"], theirs[f"{name}.lora_A.default.weight"])


def test_alpha_patterns_and_rank_stabilised_loras_are_understood(toy: Taken, tmp_path: Path) -> None:
    plain = random_lora(toy, (LINEAR, MODULES[1]))
    name = LINEAR.removeprefix("unet.")
    patterned = {"unet.lora_alpha": 4.0, "unet.alpha_pattern": {name: 1.0}}
    facts = take(diffusers_file(tmp_path / "x.safetensors", plain, patterned)).artifact.facts
    assert facts == {"alpha": {LINEAR: 1.0, MODULES[1]: 4.0}}
    stabilised = {"unet.lora_alpha": 4.0, "unet.use_rslora": True}
    facts = take(diffusers_file(tmp_path / "y.safetensors", plain, stabilised)).artifact.facts
    assert facts == {"alpha": 4.0 * 2**0.5}


@pytest.mark.parametrize(
    ("patterns", "alpha"),
    [
        ({"to_q": 1.0, "attn1.to_q": 2.0}, 1.0),  # the first counts, as PEFT has it
        ({"^to_q": 1.0}, 4.0),
        ({f"^{LINEAR.removeprefix('unet.')}": 1.0}, 1.0),
        ({LINEAR.removeprefix("unet.").replace(".", r"\."): 1.0}, 1.0),
    ],
)
def test_a_pattern_means_what_it_means_to_peft(
    patterns: dict[str, float], alpha: float, toy: Taken, tmp_path: Path
) -> None:
    from peft.utils.other import get_pattern_key

    name = LINEAR.removeprefix("unet.")
    assert patterns.get(get_pattern_key(list(patterns), name), 4.0) == alpha
    stated = {"unet.lora_alpha": 4.0, "unet.alpha_pattern": patterns}
    facts = take(diffusers_file(tmp_path / "x.safetensors", random_lora(toy, (LINEAR,)), stated)).artifact.facts
    assert facts == {"alpha": alpha}


def test_a_pattern_that_is_more_than_a_name_is_refused(toy: Taken, tmp_path: Path) -> None:
    stated = {"unet.lora_alpha": 4.0, "unet.alpha_pattern": {r"down_blocks\..*\.to_q": 1.0}}
    with pytest.raises(UsageError, match=r"by the pattern .* only names are read here"):
        read_layout(diffusers_file(tmp_path / "x.safetensors", random_lora(toy, (LINEAR,)), stated))


@pytest.mark.parametrize(
    "more",
    [
        {"lora_unet_mid_block_attentions_0_proj_in.bias_values": torch.ones(1)},
        {"lora_unet_mid_block_attentions_0_proj_in.lora_up.0": torch.ones(1)},
        {"lora_unet_mid_block_attentions_0_proj_in.bm.weight": torch.ones(1)},
    ],
)
def test_other_kinds_of_lora_are_refused_by_name(more: dict[str, Tensor], toy: Taken, tmp_path: Path) -> None:
    path = write_kohya(tmp_path / "x.safetensors", random_lora(toy, (LINEAR,)))
    save_file(load_file(path) | more, path)
    with pytest.raises(UsageError, match=next(iter(more)).replace(".", r"\.")):
        read_layout(path)


def test_a_module_that_no_family_has_is_refused_by_name(toy: Taken, tmp_path: Path) -> None:
    path = write_kohya(tmp_path / "x.safetensors", random_lora(toy, (LINEAR,)))
    other = {"lora_unet_layers_0.lora_up.weight": torch.ones(2, 2)}
    save_file(load_file(path) | other, path)
    with pytest.raises(UsageError, match="lora_unet_layers_0"):
        read_layout(path)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_{}.weight", "FLUX"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_{}.weight", "FLUX"),
        ("double_blocks.0.processor.qkv_lora1.{}.weight", "FLUX"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_{}.weight", "Stable Diffusion 3"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_{}.weight", "Stable Diffusion 3"),
    ],
)
def test_loras_of_other_architectures_are_refused_by_name(name: str, other: str, tmp_path: Path) -> None:
    sides = ("A", "B") if name.startswith("transformer") else ("down", "up")
    save_file({name.format(side): torch.ones(2, 2) for side in sides}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=f"is a LoRA for {other}, which cannot be used here"):
        read_layout(tmp_path / "x.safetensors")


def test_a_misspelt_module_is_named_with_the_nearest(toy: Taken, tmp_path: Path) -> None:
    path = write_kohya(tmp_path / "x.safetensors", random_lora(toy, (LINEAR,)))
    odd = {"lora_unet_mid_block_attentions_0_prj_in.diff": torch.ones(16, 16)}
    save_file(load_file(path) | odd, path)
    with pytest.raises(UsageError, match="lora_unet_mid_block_attentions_0_prj_in") as caught:
        read_layout(path)
    assert caught.value.hint == "nearest: lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize("side", ["lora_up", "lora_down"])
def test_half_of_a_pair_is_refused(side: str, toy: Taken, tmp_path: Path) -> None:
    path = write_kohya(tmp_path / "x.safetensors", random_lora(toy, (LINEAR,)))
    save_file({n: t for n, t in load_file(path).items() if side not in n}, path)
    with pytest.raises(UsageError, match="do not fit together: lora_"):
        read_layout(path)


def test_a_factor_in_two_spellings_is_refused(toy: Taken, tmp_path: Path) -> None:
    plain = random_lora(toy, (TEXT,))
    path = diffusers_file(tmp_path / "x.safetensors", plain, {})
    tensors = load_file(path)
    twice = {name.replace("text_encoder.text_model.", "text_encoder."): t + 1 for name, t in tensors.items()}
    save_file(tensors | twice, path)
    with pytest.raises(UsageError, match="twice"):
        read_layout(path)


def test_factors_of_two_ranks_are_refused(toy: Taken, tmp_path: Path) -> None:
    up, down, alpha = random_lora(toy, (LINEAR,))[LINEAR]
    path = write_kohya(tmp_path / "x.safetensors", {LINEAR: Factors(up[:, :1], down, alpha)})
    with pytest.raises(UsageError, match="do not fit together"):
        read_layout(path)


def test_every_module_has_a_kohya_name_of_its_own() -> None:
    names = kohya_names(SD15)
    assert len(set(names.values())) == len(names)
    assert names[LINEAR] == "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert names[TEXT] == "lora_te_text_model_encoder_layers_1_mlp_fc1"


def test_the_hash_that_a1111_knows_a_lora_by_is_of_its_bytes_alone(lora: Lora, toy: Taken, tmp_path: Path) -> None:
    plain = exported_lora(tmp_path / "a", toy, lora)
    titled = exported_lora(tmp_path / "b", toy, lora, title="Another title")
    found = []
    for path in (plain, titled):
        with safe_open(path, "pt") as file:
            found.append(file.metadata()["sshs_model_hash"])
    assert plain.read_bytes() != titled.read_bytes()
    data = plain.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert found == [hashlib.sha256(body).hexdigest()] * 2


def test_metadata_tells_other_programs_rank_and_alpha(lora: Lora, even: Lora, toy: Taken, tmp_path: Path) -> None:
    for name, each, alpha in (("a", lora, "Dynamic"), ("b", even, "1.0")):
        with safe_open(exported_lora(tmp_path / name, toy, each), "pt") as file:
            found = file.metadata()
        assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("2", alpha)
        assert json.loads(found["ss_network_args"])["conv_dim"] == "4"
        assert found["ss_network_module"] == "networks.lora"
        assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"


def pipeline_of(work: Path, toy: Taken) -> Any:
    folder = export(work / "base", toy, ["diffusers"], {}) / "diffusers"
    return StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)


def test_stock_diffusers_loads_our_lora_and_draws_alike(even: Lora, toy: Taken, tmp_path: Path) -> None:
    pipeline, ours = pipeline_of(tmp_path, toy), pipeline_of(tmp_path, toy)
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 77, 16, generator=draw)
    ids = torch.tensor([pipeline.tokenizer("a red cat", padding="max_length", max_length=77).input_ids])

    def say(p: Any) -> list[Tensor]:
        with torch.no_grad():
            return [p.unet(latents, 500, encoder_hidden_states=text).sample, p.text_encoder(ids).last_hidden_state]

    before = say(pipeline)
    pipeline.load_lora_weights(str(exported_lora(tmp_path / "lora", toy, even)))
    live(ours.unet, "unet", even)
    live(ours.text_encoder, "text_encoder", even)
    for old, theirs, mine in zip(before, say(pipeline), say(ours), strict=True):
        effect = float((theirs - old).abs().max())
        assert effect > 1e-3
        assert float((theirs - mine).abs().max()) <= 2e-6 * max(effect, float(old.abs().max()))


def test_stock_diffusers_goes_wrong_where_alphas_differ_and_so_its_reader_is_not_asked(
    toy: Taken, tmp_path: Path
) -> None:
    """When this fails, diffusers has learned it; what we bake of such files is exact (tests/edits/test_bake.py)."""
    attention = "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn1"
    lora = random_lora(toy, (f"{attention}.to_out.0", f"{attention}.to_v", WIDE), alphas=(0.5, 2.0, 2.0))
    pipeline, ours = pipeline_of(tmp_path, toy), pipeline_of(tmp_path, toy)
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 77, 16, generator=draw)

    def say(p: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = p.unet(latents, 500, encoder_hidden_states=text).sample
        return found

    before = say(pipeline)
    pipeline.load_lora_weights(str(exported_lora(tmp_path / "lora", toy, lora)))
    live(ours.unet, "unet", lora)
    assert float((say(pipeline) - say(ours)).abs().max()) > 1e-2 * float((say(ours) - before).abs().max())


def test_a_loras_hashes_keep_no_more_than_how_it_begins() -> None:
    data = random.Random(0).randbytes(LEGACY.stop + 70_000)
    shapes, metadata, body = {"a": ("U8", (len(data),))}, {"ss_x": "1", "modelspec.title": "other"}, Body()
    for start in range(0, len(data), 50_000):
        body.update(data[start : start + 50_000])
    assert len(body.start) == LEGACY.stop
    first, _ = header_bytes(shapes, {"ss_x": "1"})
    legacy = hashlib.sha256((first + data)[0x100000:0x110000]).hexdigest()[:8]
    whole = hashlib.sha256(data).hexdigest()
    assert hashes(shapes, metadata, body) == {"sshs_model_hash": whole, "sshs_legacy_hash": legacy}
