"""Hosts on this machine, and a project whose sources come from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sdforge.fetch.wire as wire
from sdforge.cli import main
from tests.fetch.server import Host, serving


class Said:
    """How a command ended, run within this process."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Forge = Callable[..., Said]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    """A host that is the Hub and Civitai, for this process and its children; nothing is waited for."""
    monkeypatch.setattr(wire, "PAUSE", 0.001)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "CIVITAI_TOKEN", "http_proxy", "HTTP_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    with serving(Host()) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setenv("CIVITAI_ENDPOINT", found.url)
        yield found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project without anything."""
    folder = tmp_path / "project"
    (folder / "recipes").mkdir(parents=True)
    (folder / "forge.toml").write_text("# ours\n")
    return folder


@pytest.fixture
def forge(root: Path, capfd: pytest.CaptureFixture[str]) -> Forge:
    """Run a command in the project; its exit code must be this one."""

    def run(*arguments: str, code: int = 0, at: Path = root) -> Said:
        capfd.readouterr()
        found = main(["-C", str(at), *arguments])
        said = Said(found, *capfd.readouterr())
        assert "Traceback" not in said.out + said.err
        assert said.code == code, said.out + said.err
        return said

    return run
