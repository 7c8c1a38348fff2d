"""What stands beside the tensors, in any words: a file is read, or refused in one sentence that names it."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdforge.errors import UsageError
from sdforge.families import family
from sdforge.families.stable_diffusion import CROSS, TABLE
from sdforge.families.strangers import stranger_folder
from sdforge.formats.layout import read_layout
from tests.families.loras import LINEAR, random_lora
from tests.families.workbench import Taken
from tests.formats.conftest import export
from tests.run.hypernetworks import LINEAR as PLAIN
from tests.run.hypernetworks import kept

DEEP = "[" * 100_000
ODD = [
    '"word"',
    "5",
    "null",
    "[1]",
    "[[]]",
    "{}",
    '{"tokens": [1]}',
    '{"": {"": []}}',
    '{"structure": 1}',
    "NaN",
    "1e999",
    '"\\ud800"',
    '{"token": "\\ud800", "vectors": 1%s}' % ("0" * 400),
    "no",
    DEEP,
]
ODD_IDS = [text[:16] for text in ODD]


def restated(path: Path, key: str, text: str) -> Path:
    """Write a file's tensors anew, with something else in its metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    save_file(load_file(path), path, metadata | {key: text})
    return path


def checkpoint(work: Path, toy: Taken) -> Path:
    return export(work, toy, ["checkpoint"], {}) / "checkpoint.safetensors"


def hypernetwork(work: Path, toy: Taken) -> Path:
    given = kept(work / "kept", PLAIN).given()
    (file,) = (export(work, toy, ["hypernetworks"], {}, hypernetworks=[given]) / "hypernetworks").iterdir()
    return file


def lora(work: Path, toy: Taken) -> Path:
    made = random_lora(toy, (LINEAR,))[LINEAR]
    work.mkdir()
    save_file({f"{LINEAR}.lora_A.weight": made.down, f"{LINEAR}.lora_B.weight": made.up}, work / "lora.safetensors")
    return work / "lora.safetensors"


def picture(work: Path, toy: Taken) -> Path:  # noqa: ARG001 -- one signature for all
    work.mkdir()
    stated = {"sdforge.kind": "image_embedding", "sdforge.facts": "{}"}
    save_file({"image_embeds": torch.ones(1, 8)}, work / "picture.safetensors", stated)
    return work / "picture.safetensors"


def inversion(work: Path, toy: Taken) -> Path:  # noqa: ARG001
    work.mkdir()
    stated = {"sdforge.kind": "null_text", "sdforge.facts": "{}"}
    tensors = {"uncond": torch.ones(2, 77, 8), "latent": torch.ones(1, 4, 8, 8)}
    save_file(tensors, work / "inversion.safetensors", stated)
    return work / "inversion.safetensors"


@pytest.mark.parametrize("text", ODD, ids=ODD_IDS)
@pytest.mark.parametrize(
    ("make", "key"),
    [
        (checkpoint, "sdforge.facts"),
        (checkpoint, "sdforge.tokenizer"),
        (hypernetwork, "sdforge.facts"),
        (lora, "lora_adapter_metadata"),
        (picture, "sdforge.facts"),
        (inversion, "sdforge.facts"),
    ],
)
def test_odd_metadata_is_read_over_or_refused(
    make: Callable[[Path, Taken], Path], key: str, text: str, toy: Taken, tmp_path: Path
) -> None:
    path = restated(make(tmp_path / "made", toy), key, text)
    refused = ""
    try:
        read_layout(path)
    except UsageError as error:
        refused = error.message
    assert not refused or (str(path) in refused and len(refused) < len(str(path)) + 200)


@pytest.mark.parametrize(
    "facts",
    [
        {"prediction": "odd"},
        {"latent_scaling": "0.2"},
        {"latent_scaling": 0},
        {"unet_heads": [8, 0]},
        {"unet_heads": 2.5},
        {"resolution": True},
        {"text_activation": 3},
        {"zero_terminal_snr": 1},
        {"tokens": [["<cat>", 0]]},
        {"of a later version": 1},
    ],
)
def test_facts_that_cannot_be_are_named(facts: dict[str, Any], toy: Taken, tmp_path: Path) -> None:
    path = restated(checkpoint(tmp_path / "made", toy), "sdforge.facts", json.dumps(facts))
    (name,) = facts
    with pytest.raises(UsageError, match=f"states {name} = .*, which is not known here"):
        read_layout(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lora_alpha": "much"}, "states 'much' as the alpha of"),
        ({"lora_alpha": 10**400}, "as the alpha of"),
        ({"alpha_pattern": [1]}, r"states '\[1\]' as the alpha of"),
        ({"alpha_pattern": {"to_q": {}}}, "states '{}' as the alpha of"),
        ({"peft_type": "OFT", "num_cayley_neumann_terms": "x"}, "states num_cayley_neumann_terms as 'x'"),
    ],
)
def test_pefts_configuration_is_taken_at_its_word(
    change: dict[str, Any], sentence: str, toy: Taken, tmp_path: Path
) -> None:
    folder = lora(tmp_path / "made", toy).parent
    shutil.move(folder / "lora.safetensors", folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "lora_alpha": 4, "r": 2} | change
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=sentence):
        read_layout(folder)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_refused(alpha: float, toy: Taken, tmp_path: Path) -> None:
    path = lora(tmp_path / "made", toy)
    save_file(load_file(path) | {f"{LINEAR}.alpha": torch.tensor(alpha)}, path)
    with pytest.raises(UsageError, match="states an alpha that is no number"):
        read_layout(path)


@pytest.mark.parametrize(
    ("part", "config", "sentence"),
    [
        ("unet", {"sample_size": [64, 64]}, r"resolution as \[64, 64\] where one whole number"),
        ("unet", {"sample_size": 0}, "resolution as 0 where"),
        ("unet", {"attention_head_dim": 10**30}, "unet heads as 1000.* where whole numbers"),
        ("vae", {"norm_num_groups": -1}, "vae groups as -1 where"),
        ("vae", {"scaling_factor": float("nan")}, "latent scaling as nan where a number above 0"),
        ("scheduler", {"beta_end": float("inf")}, "beta end as inf where"),
        ("text_encoder", {"num_attention_heads": 0}, "text heads as 0 where"),
        ("text_encoder", {"hidden_act": ["gelu"]}, r"text activation as \['gelu'\] where a word"),
        ("unet", {"in_channels": [4]}, r"in_channels = \[4\], expected 4"),
        ("unet", {"down_block_types": 4}, "down_block_types = 4, expected"),
    ],
)
def test_a_configuration_is_taken_at_its_word(part: str, config: dict[str, Any], sentence: str) -> None:
    configs = {"unet": {}, "vae": {}} | {part: config}
    assert stranger_folder(configs) == ""
    assert not family("sdxl").owns_folder(configs)
    with pytest.raises(UsageError, match=sentence):
        family("sd15").facts_of_folder(configs)


def test_a_resolution_that_is_left_open_is_the_usual_one() -> None:
    configs: dict[str, Any] = {"unet": {"sample_size": None, "attention_head_dim": 8}, "vae": {}}
    assert family("sd15").facts_of_folder(configs) == {}


def misshapen(path: Path, ending: str, shape: tuple[int, ...]) -> Path:
    """Write a file's tensors anew, one of them of another shape."""
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(ending))
    with safe_open(path, "pt") as file:
        save_file(tensors | {name: torch.zeros(shape, dtype=tensors[name].dtype)}, path, file.metadata())
    return path


def matrices(work: Path, toy: Taken) -> Path:  # noqa: ARG001
    work.mkdir()
    name = f"{CROSS.removesuffix('.to_k.weight')}.processor.to_k_custom_diffusion.weight"
    save_file({name: torch.ones(8, 8)}, work / "matrices.safetensors")
    return work / "matrices.safetensors"


@pytest.mark.parametrize(
    ("make", "ending", "shape"),
    [
        (checkpoint, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", (8,)),
        (checkpoint, "input_blocks.0.0.weight", (4, 36)),
        (checkpoint, "token_embedding.weight", ()),
        (checkpoint, "first_stage_model.quant_conv.weight", (8, 0, 1, 1)),
        (lora, "lora_A.weight", (8,)),
        (lora, "lora_B.weight", ()),
        (matrices, "to_k_custom_diffusion.weight", (8,)),
    ],
)
def test_a_shape_that_no_such_tensor_has_is_refused(
    make: Callable[[Path, Taken], Path], ending: str, shape: tuple[int, ...], toy: Taken, tmp_path: Path
) -> None:
    path = misshapen(make(tmp_path / "made", toy), ending, shape)
    with pytest.raises(UsageError, match=str(path)):
        read_layout(path)


def test_a_text_encoder_without_a_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_file({"text_model.encoder.layers.0.layer_norm1.bias": torch.ones(8), TABLE: torch.ones(8)}, path)
    with pytest.raises(UsageError, match=r"token_embedding.weight of shape \[8\], which no text encoder has"):
        read_layout(path)


def test_half_a_letter_is_no_text(tmp_path: Path) -> None:
    # the reference library cannot read such a header either
    entry = {"dtype": "F32", "shape": [1, 8], "data_offsets": [0, 32]}
    text = json.dumps({"__metadata__": {"title": "\ud800"}, "emb_params": entry}).encode()
    (tmp_path / "half.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(32))
    with pytest.raises(UsageError, match="metadata that is not text"):
        read_layout(tmp_path / "half.safetensors")
