"""A project with three toy bases, in which files of other programs are imported and what they ask for is built."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdforge.cli import main
from tests.build.inline import Bench
from tests.toys import write_drawings

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
FORGE_TOML = '[source.alpha]\nfrom = "alpha"\n'


@dataclass
class Importer:
    """A project, and `forge import` in it."""

    root: Path
    said: Callable[[], str]

    def run(self, name: str, text: str, *more: str, code: int = 0) -> str:
        """Import a file of this name and text; return what was said."""
        path = self.root / "theirs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        self.said()
        found = main(["-C", str(self.root), "import", f"theirs/{name}", *more])
        said = self.said()
        assert found == code, said
        return said

    def recipe(self, name: str) -> str:
        return (self.root / "recipes" / f"{name}.toml").read_text()

    def values(self, name: str) -> dict[str, Any]:
        import tomllib

        return tomllib.loads(self.recipe(name))

    def made(self, name: str) -> dict[str, Tensor]:
        """Return the tensors in fp64 of the target of a built recipe that is called as it is."""
        shapes = {key: tensor.shape for key, tensor in self.base("alpha").items()}
        return {
            key: torch.frombuffer(bytearray(data), dtype=torch.float16).reshape(shapes[key]).double()
            for key, data in Bench(self.root).bytes_of(name, name).items()
        }

    def base(self, name: str) -> dict[str, Tensor]:
        """Return a base's tensors in fp64."""
        files = {part: self.root / name / part / f"{file}.safetensors" for part, file in PARTS.items()}
        return {f"{part}.{key}": t.double() for part, file in files.items() for key, t in load_file(file).items()}


@pytest.fixture(scope="session")
def three_bases(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Path) -> Path:
    """Three bases of one shape: a toy, and two that are it with noise."""
    folder = tmp_path_factory.mktemp("three")
    torch.manual_seed(3)
    for name in ("alpha", "beta", "gamma"):
        shutil.copytree(toy_checkpoint, folder / name)
        for part, file in PARTS.items() if name != "alpha" else ():
            path = folder / name / part / f"{file}.safetensors"
            tensors = load_file(path)
            save_file({key: t + 0.05 * torch.randn(t.shape).half() for key, t in tensors.items()}, path)
    write_drawings(folder / "drawings")
    for caption in (folder / "drawings").glob("*.txt"):
        caption.write_text("a square")
    (folder / "recipes").mkdir()
    (folder / "forge.toml").write_text(FORGE_TOML)
    return folder


@pytest.fixture
def importer(
    tmp_path: Path, three_bases: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Importer:
    monkeypatch.delenv("FORGE_CACHE", raising=False)
    shutil.copytree(three_bases, tmp_path / "project")
    return Importer(tmp_path / "project", lambda: "".join(capsys.readouterr()))
