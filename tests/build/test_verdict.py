"""A kept verdict «nothing to do» holds for as long as nothing changes that it rests on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sdforge import places, verdict
from sdforge.session import open_session
from tests.build.test_probes import change_pixel
from tests.conftest import METHODS, Project, new_project

pytestmark = pytest.mark.usefixtures("forked")


def turn_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


CHANGES: dict[str, Callable[[Project], object]] = {
    "a pixel": lambda p: change_pixel(p.root / "drawings" / "0.png"),
    "a caption": lambda p: (p.root / "drawings" / "0.txt").write_text("another\n"),
    "a new picture": lambda p: shutil.copyfile(p.root / "drawings" / "0.png", p.root / "drawings" / "new.png"),
    "a picture that is gone": lambda p: (p.root / "drawings" / "2.png").unlink(),
    "a base's weights": lambda p: turn_a_bit(p.root / "base" / "unet" / "diffusion_pytorch_model.safetensors"),
    "a base's folder": lambda p: (p.root / "base" / "unet" / "more.txt").write_text("x"),
    "a setting": lambda p: p.edit("rank = 5", "rank = 4"),
    "forge.toml": lambda p: p.edit("[source.base]", "[source.base]\nlicence = 'CC0-1.0'", "forge.toml"),
    "forge.local.toml": lambda p: (p.root / "forge.local.toml").write_text("[run]\nthreads = 2\n"),
    "the lock": lambda p: (p.root / "forge.lock").write_text(p.lock + "\n"),
    "a lock that is gone": lambda p: (p.root / "forge.lock").unlink(),
    "another recipe": lambda p: shutil.copyfile(p.recipe, p.recipe.with_name("other.toml")),
    "an output that is gone": lambda p: p.output.unlink(),
    "an output that was tampered with": lambda p: turn_a_bit(p.output),
    "something that the store learned": lambda p: _learn(p),
    "an index that is gone": lambda p: (p.root / "cache/v1/index.db").unlink(),
}


def _learn(project: Project) -> None:
    session = open_session(project.root)
    session.store.prepare()
    session.store.add_alias("a" * 64, "b" * 64)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Path) -> Project:
    project = new_project(tmp_path_factory.mktemp("verdict") / "project", toy_checkpoint)
    project.build()
    return project


@pytest.fixture
def kept(finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy with a verdict."""
    monkeypatch.setenv(places.METHODS, str(METHODS))
    monkeypatch.setattr(verdict, "YOUNG", 0)
    places.code_fingerprint.cache_clear()
    shutil.copytree(finished.root, tmp_path / "project")
    project = Project(tmp_path / "project")
    project.build()
    session = open_session(project.root)
    plan = session.plan(session.resolve([]))
    assert not plan.to_do
    verdict.keep(session, plan, [], ["nothing to do"])
    session.store.close()
    return project


def recall(project: Project, *targets: str, locked: bool = False) -> list[str] | None:
    return verdict.recall(project.root, list(targets), locked=locked)


def test_it_is_recalled_for_the_same_wish_alone(kept: Project) -> None:
    assert recall(kept) == ["nothing to do"]
    assert recall(kept, "a") is None
    assert recall(kept, locked=True) is None


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_ends_it(kept: Project, change: Callable[[Project], object]) -> None:
    change(kept)
    assert recall(kept) is None


def test_other_code_ends_it(kept: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(METHODS, tmp_path / "methods")
    monkeypatch.setenv(places.METHODS, str(tmp_path / "methods"))
    places.code_fingerprint.cache_clear()
    assert recall(kept) is None


def test_it_is_not_kept_on_files_that_are_too_young(kept: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "YOUNG", 2_000_000_000)
    os.utime(kept.recipe)
    (kept.root / "drawings" / "0.txt").write_text("another\n")
    kept.build()
    session = open_session(kept.root)
    plan = session.plan(session.resolve([]))
    verdict.keep(session, plan, [], ["nothing to do"])
    assert recall(kept) is None
