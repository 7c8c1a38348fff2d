"""What the libraries we stand on do to the unwary, where no test of a format or a method says it already.

Elsewhere: folded case, words within words and words that transformers 5 keeps in another file (`test_tokenizers`),
names that hide a word and rows that have none (`test_insert`), rows of a resized table, random numbers for them, bars
and tables of what was loaded (`test_load_preset`), pooling past the true end and clip skip (`test_every_family`,
`test_sd15_load`), names without `text_model.` and slow tokenizers (`test_checkpoint_formats`, `test_oldest_pair`),
alphas that differ (`test_lora_formats`), LoHa and LoKr scaled twice (`test_bake_forms`, `test_updates`, `test_resize`),
where a bake is rounded (`test_bake`), merged position ids (`test_merge_plan`), metadata in random order
(`test_safetensors_format`).
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sdforge.errors import UsageError
from sdforge.executors.local import LocalWorker
from sdforge.formats.safetensors import read_header
from tests.house.test_imports import MODULES, imported

ROOT = Path(__file__).parents[2]


def test_nothing_needs_torchvision() -> None:
    """PyPI's does not fit a torch that was built for the CPU alone, and then nothing can be imported."""
    assert not [name for name, path in MODULES.items() if "torchvision" in imported(path, lazily=True)]
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [need for needs in stated["optional-dependencies"].values() for need in needs]
    assert not [need for need in [*stated["dependencies"], *extras] if need.startswith("torchvision")]


def test_a_worker_is_offline_before_it_imports_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """`local_files_only` alone is ignored where `from_single_file` has no configuration beside it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    worker = LocalWorker(1)
    try:
        environment = Path(f"/proc/{worker.process.pid}/environ")
        while not (entries := environment.read_bytes().split(b"\0"))[0]:  # it is empty for a moment after the start
            assert worker.alive()
    finally:
        worker.process.kill()
        worker.end()
    assert b"HF_HUB_OFFLINE=1" in entries


def test_the_library_lets_the_last_of_two_equal_names_win_and_we_refuse_the_file(tmp_path: Path) -> None:
    """Who reads with it and checks with us, or the other way round, would see two different tensors."""
    fields = '{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'
    text = ('{"x":' + fields % (0, 1) + ',"y":' + fields % (1, 2) + ',"x":' + fields % (0, 1) + "}").encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\1\2")
    assert torch.equal(
        safetensors.torch.load_file(tmp_path / "x.safetensors")["x"], torch.tensor([1], dtype=torch.uint8)
    )
    with pytest.raises(UsageError, match="names 'x' twice"):
        read_header(tmp_path / "x.safetensors")
