"""Single files that hold their U-Net twice: as it was trained, and averaged (EMA). A source says which one is meant."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdforge.artifact import Artifact
from sdforge.errors import RecipeError, UsageError
from sdforge.families import family, family_names
from sdforge.families.stable_diffusion import UNET
from sdforge.formats.layout import read_layout
from sdforge.formats.safetensors import read_header
from sdforge.formats.single_file import with_ema
from sdforge.session import open_session
from tests.families.workbench import Taken

COPY = "model_ema.diffusion_modelinput_blocks00weight"


@pytest.fixture(scope="module")
def file(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy as a single file whose averaged numbers are half of the others."""
    tensors = load_file(exported / "checkpoint.safetensors")
    copies = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor / 2
        for name, tensor in tensors.items()
        if name.startswith(UNET)
    }
    assert COPY in copies
    path = tmp_path_factory.mktemp("ema") / "both.safetensors"
    save_file(tensors | copies | {"model_ema.decay": torch.tensor(0.99)}, path)
    return path


@pytest.fixture
def root(file: Path, toys: Path, tmp_path: Path) -> Path:
    (tmp_path / "recipes").mkdir()
    shutil.copyfile(file, tmp_path / "both.safetensors")
    sources = (
        '[source.trained]\nfrom = "both.safetensors"\n'
        '[source.averaged]\nfrom = "both.safetensors"\nuse_ema = true\n'
        '[source.alone]\nfrom = "alone.safetensors"\nuse_ema = true\n'
        '[source.folder]\nfrom = "toy"\nuse_ema = true\n'
    )
    (tmp_path / "forge.toml").write_text(sources)
    shutil.copytree(toys / "toy", tmp_path / "toy")
    return tmp_path


def sourced(root: Path, *names: str) -> list[Artifact]:
    """Return sources as a plan sees them."""
    lines = "\n".join(f'[cast.{name}-wide]\ncheckpoint = "{name}"\ndtype = "fp32"' for name in names)
    (root / "recipes" / "r.toml").write_text(f'family = "sd15"\n{lines}\n')
    session = open_session(root)
    session.plan(session.resolve([f"r:{name}-wide" for name in names]))
    return [session.sources.artifact(session.graph.sources[name]) for name in names]


@pytest.mark.parametrize("name", family_names())
def test_no_two_tensors_of_a_unet_have_one_name_without_its_dots(name: str) -> None:
    names = {each.single for each in family(name).names() if each.single.startswith(UNET)}
    assert len({single.replace(".", "") for single in names}) == len(names)


def test_the_averaged_unet_is_another_artifact_with_the_same_other_parts(root: Path, toy: Taken) -> None:
    trained, averaged = sourced(root, "trained", "averaged")
    assert trained.components["unet"].identity == toy.identity("unet")
    assert averaged.components["unet"].identity != toy.identity("unet")
    for part in ("text_encoder", "vae"):
        assert averaged.components[part].identity == trained.components[part].identity
    assert averaged.notes["files"] == trained.notes["files"]


def test_which_one_is_asked_first_is_no_matter(root: Path, toy: Taken) -> None:
    """Both readings of one file are remembered apart."""
    averaged, trained = sourced(root, "averaged", "trained")
    assert trained.components["unet"].identity == toy.identity("unet")
    again, _ = sourced(root, "averaged", "trained")
    assert again.identity == averaged.identity


def test_its_numbers_are_those_of_the_copy(file: Path, toy: Taken) -> None:
    layout = read_layout(file, lambda path: with_ema(path, read_header(path)))
    data = file.read_bytes()
    found = next(each for each in layout.tensors if each.name == "conv_in.weight")
    raw = bytearray(data[found.offset : found.offset + found.size])
    halves = torch.frombuffer(raw, dtype=torch.float16).reshape(found.shape)
    assert torch.equal(halves, toy.tensors("unet")["conv_in.weight"] / 2)


def test_a_file_without_a_copy_is_refused_with_the_sources_name(root: Path, exported: Path) -> None:
    (root / "alone.safetensors").write_bytes((exported / "checkpoint.safetensors").read_bytes())
    with pytest.raises(RecipeError, match=r"^alone: .*holds no averaged copy \(EMA\)") as caught:
        sourced(root, "alone")
    assert "use_ema" in caught.value.problems[0].hint


def test_half_a_copy_is_refused_by_the_first_name_that_is_missing(file: Path, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in load_file(file).items() if name != COPY}
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(UsageError, match=r"without model\.diffusion_model\.input_blocks\.0\.0\.weight"):
        with_ema(tmp_path / "less.safetensors", read_header(tmp_path / "less.safetensors"))
    save_file(tensors | {COPY: torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=r"without model\.diffusion_model\.input_blocks\.0\.0\.weight"):
        with_ema(tmp_path / "other.safetensors", read_header(tmp_path / "other.safetensors"))


def test_a_folder_holds_none(root: Path) -> None:
    with pytest.raises(RecipeError, match="folder is a folder, and only single files"):
        sourced(root, "folder")
