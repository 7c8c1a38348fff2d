"""Tensors of integers and booleans are no weights: they are refused where a file is read, with the tensor's name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdforge.errors import UsageError
from sdforge.formats.embedding import read_named
from sdforge.formats.layout import read_layout
from sdforge.formats.safetensors import read_header
from tests.families.workbench import Taken, take

LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize(
    ("dtype", "called"), [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.int64, "I64"), (torch.bool, "BOOL")]
)
def test_a_checkpoint_of_whole_numbers_is_refused(
    dtype: torch.dtype, called: str, exported: Path, tmp_path: Path
) -> None:
    tensors = load_file(exported / "checkpoint.safetensors")
    path = saved(tmp_path / "x.safetensors", tensors | {FIRST: tensors[FIRST].to(dtype)})
    with pytest.raises(UsageError, match=rf"x\.safetensors holds unet\.conv_in\.weight as {called}: whole") as caught:
        read_layout(path)
    assert "fp16" in caught.value.hint


def test_so_are_a_network_of_a_folder_and_one_alone(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(exported / "diffusers", folder)
    file = folder / "vae" / WEIGHTS
    tensors = load_file(file)
    saved(file, tensors | {"decoder.conv_in.bias": tensors["decoder.conv_in.bias"].int()})
    for path in (folder, shutil.copy(file, tmp_path / "vae.safetensors")):
        with pytest.raises(UsageError, match=r"holds vae\.decoder\.conv_in\.bias as I32"):
            read_layout(Path(path))


def test_so_are_factors_and_rows(tmp_path: Path) -> None:
    factors = {f"{LAYER}.lora_up.weight": torch.ones(8, 2), f"{LAYER}.lora_down.weight": torch.ones(2, 8).char()}
    with pytest.raises(UsageError, match=r"attn1\.to_q\.lora_down as I8"):
        read_layout(saved(tmp_path / "lora.safetensors", factors))
    rows = torch.ones(2, 16).short()
    with pytest.raises(UsageError, match=r"holds embedding\.text_encoder as I16"):
        read_layout(saved(tmp_path / "rows.safetensors", {"emb_params": rows}))
    carried = saved(tmp_path / "carried.safetensors", {"bundle_emb.word.emb_params": rows})
    with pytest.raises(UsageError, match=r"holds embedding\.text_encoder as I16"):
        read_named(carried, read_header(carried), "word")


@pytest.mark.parametrize(
    "change",
    [
        {IDS: torch.arange(77)[None], "model_ema.num_updates": torch.tensor(7)},
        {FIRST: torch.float8_e4m3fn},
        {FIRST: torch.float8_e5m2},
        {FIRST: torch.float64},
    ],
)
def test_what_no_weight_is_and_small_and_large_types_are_read(
    change: dict[str, Any], toy: Taken, exported: Path, tmp_path: Path
) -> None:
    tensors = load_file(exported / "checkpoint.safetensors")
    tensors |= {n: new if isinstance(new, Tensor) else tensors[n].to(new) for n, new in change.items()}
    found = take(saved(tmp_path / "x.safetensors", tensors))
    assert found.identity("vae") == toy.identity("vae")
