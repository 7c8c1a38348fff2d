"""Projects that several files share: one of two bases, a LoRA and drawings; one that survives whatever happens."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.build.inline import Bench
from tests.build.one_training import CLUSTER
from tests.build.one_training import RECIPE as ONE_TRAINING
from tests.conftest import Project, new_project
from tests.quick import Quick
from tests.survival import RECIPE, Whole
from tests.toys import write_checkpoint, write_drawings

MID = "mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
TOML = """\
[source.base]
from = "base"
[source.ink]
from = "ink"
[source.glow]
from = "glow.safetensors"
[source.word]
from = "word.safetensors"
[dataset.drawings]
path = "drawings"
trigger = "<toy>"
"""


@pytest.fixture(scope="session")
def bench_files(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("bench")
    shutil.copytree(toy_checkpoint, folder / "base")
    write_checkpoint(folder / "ink", seed=1)
    write_drawings(folder / "drawings")
    torch.manual_seed(2)
    factors = {"lora_down.weight": torch.randn(2, 8), "lora_up.weight": torch.randn(8, 2), "alpha": torch.tensor(2.0)}
    save_file({f"lora_unet_{MID}.{name}": t.half() for name, t in factors.items()}, folder / "glow.safetensors")
    save_file({"emb_params": torch.randn(2, 8).half()}, folder / "word.safetensors")
    (folder / "forge.toml").write_text(TOML)
    return folder


@pytest.fixture
def bench(tmp_path: Path, bench_files: Path) -> Bench:
    shutil.copytree(bench_files, tmp_path / "project")
    return Bench(tmp_path / "project")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Path, quick: Quick) -> Whole:
    """A project built without a fault, and what it came out as. Read only: copy or clone it."""
    root = tmp_path_factory.mktemp("whole") / "project"
    new_project(root, toy_checkpoint, RECIPE)
    assert quick.forge(root, "build", "--json").code == 0
    return Whole(root)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Path) -> Project:
    """A project with one training, as this machine builds it. Read only: clone it."""
    project = new_project(tmp_path_factory.mktemp("uninterrupted") / "project", toy_checkpoint, ONE_TRAINING)
    (project.root / "forge.local.toml").write_text(CLUSTER)
    project.build()
    return project


@pytest.fixture
def fresh(uninterrupted: Project, tmp_path: Path) -> Project:
    """The same with a cache of its own and no pins."""
    project = uninterrupted.clone(tmp_path / "project")
    (project.root / "forge.lock").unlink()
    return project
