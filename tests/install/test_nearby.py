"""A new project says which models lie beside it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from sdforge.cli import main
from sdforge.formats.safetensors import write_file


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    return lambda: capsys.readouterr().out


def embedding(path: Path) -> None:
    """Write an embedding of SD 1.x, whose rows are 768 wide."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, {"emb_params": ("F16", (1, 768))}, lambda _: [bytes(2 * 768)])


def test_models_of_a_program_beside_it_are_counted_and_their_folders_named(
    tmp_path: Path, said: Callable[[], str]
) -> None:
    models = tmp_path / "ComfyUI" / "models"
    embedding(models / "embeddings" / "cat.safetensors")
    embedding(models / "embeddings" / "more" / "dog.safetensors")
    (models / "loras").mkdir()
    (models / "loras" / "broken.safetensors").write_bytes(b"no header")
    assert main(["-C", str(tmp_path), "init", "mine"]) == 0
    text = said()
    assert "beside it: 2 embeddings (2 Stable Diffusion 1.x), 1 other file" in text
    local = tomllib.loads((tmp_path / "mine" / "forge.local.toml").read_text())
    assert local == {"folders": [str(models / "embeddings"), str(models / "loras")]}
    assert main(["-C", str(tmp_path / "mine"), "add", "cat", "cat.safetensors"]) == 0
    assert main(["-C", str(tmp_path / "mine"), "list", "--sources", "--json"]) == 0
    assert "cat" in json.dumps(said())


def test_where_nothing_lies_beside_it_nothing_is_said_or_written(tmp_path: Path, said: Callable[[], str]) -> None:
    assert main(["-C", str(tmp_path), "init", "mine"]) == 0
    assert "beside it" not in said()
    assert not (tmp_path / "mine" / "forge.local.toml").exists()
