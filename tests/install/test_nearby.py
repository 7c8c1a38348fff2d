"""A new project says which models lie beside it."""

from __future__ import annotations

import errno
import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import sdforge.nearby as nearby
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


def test_a_folder_beside_it_that_is_not_for_us_is_passed_over(
    tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    embedding(tmp_path / "models" / "embeddings" / "cat.safetensors")
    (tmp_path / "private").mkdir()
    whole = Path.is_dir

    def is_dir(path: Path) -> bool:
        if "private" in path.parts:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(Path, "is_dir", is_dir)
    assert main(["-C", str(tmp_path), "init", "mine"]) == 0
    assert "forge build" in said()


def test_of_a_large_folder_the_beginning_is_looked_at(
    tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearby, "MOST_ENTRIES", 3)
    for i in range(6):
        embedding(tmp_path / "ComfyUI" / "models" / "embeddings" / f"{i}.safetensors")
    assert main(["-C", str(tmp_path), "init", "mine"]) == 0
    assert "3 embeddings" in said()


def test_a_project_is_made_beside_a_cache_that_is_kept(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".gitignore").write_text("mine\n")
    assert main(["-C", str(tmp_path), "init", "."]) == 0
    assert (tmp_path / "cache" / ".gitignore").read_text() == "mine\n"
