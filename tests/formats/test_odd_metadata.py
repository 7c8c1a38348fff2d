"""What stands beside the tensors, in any words: a file is read, or refused in one sentence that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdforge.errors import UsageError
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
