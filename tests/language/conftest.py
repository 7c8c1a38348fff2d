"""A project on the disk, and what `forge` says of its recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdforge.cli import main
from tests.planner.conftest import World, toy_world

FORGE_TOML = """
[source.flat]
from = "bases/flat.safetensors"

[source.ink]
from = "bases/ink.safetensors"

[dataset.sketches]
path = "data/sketches"
"""


@dataclass(frozen=True)
class Said:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


Forge = Callable[..., Said]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project that declares two bases and a data set; none of them is there."""
    folder = tmp_path / "project"
    (folder / "recipes").mkdir(parents=True)
    (folder / "forge.toml").write_text(FORGE_TOML)
    return folder


@pytest.fixture
def forge(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Forge:
    """Run a command in the project."""
    monkeypatch.delenv("FORGE_CACHE", raising=False)

    def run(*arguments: str) -> Said:
        capsys.readouterr()
        code = main(["-C", str(root), *arguments])
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def check(root: Path, forge: Forge) -> Callable[[str | bytes], Said]:
    """Check one recipe."""

    def run(text: str | bytes) -> Said:
        data = text.encode() if isinstance(text, str) else text
        (root / "recipes" / "r.toml").write_bytes(data)
        return forge("check", "r")

    return run


@pytest.fixture
def world(tmp_path: Path) -> World:
    return toy_world(tmp_path)
