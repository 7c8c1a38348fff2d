"""What the whole suite shares: one toy checkpoint, and projects in which the real `forge` runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from tests.toys import write_checkpoint, write_drawings

if TYPE_CHECKING:
    from tests.quick import Quick

FORGE = Path(sys.executable).with_name("forge")
METHODS = Path(__file__).parent / "methods"
os.environ.setdefault("OMP_NUM_THREADS", "1")

FORGE_TOML = """\
default = ["toy"]

[source.base]
from = "base"

[dataset.drawings]
path = "drawings"
trigger = "<toy>"
"""

# a chain of three trainings that need no torch, and an export
RECIPE = """\
family = "sd15"

[rehearsal.a]
on = "base"
dataset = "drawings"
rank = 8

[rehearsal.b]
on = "a"
dataset = "drawings"
rank = 6

[rehearsal.c]
on = "b"
dataset = "drawings"
rank = 5

[preset]
checkpoint = "c"
"""


@dataclass
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """Its JSON Lines, where it was asked for them."""
        return [json.loads(line) for line in self.out.splitlines() if line.startswith("{")]

    @property
    def built(self) -> list[str]:
        """Targets (without the recipe) that were run, in order; those that were restored are not among them."""
        return [_bare(e) for e in self.events if e.get("state") == "built" and not e.get("restore")]

    @property
    def restored(self) -> list[str]:
        return [_bare(e) for e in self.events if e.get("state") == "built" and e.get("restore")]

    def of(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event]


def _bare(event: dict[str, Any]) -> str:
    return str(event["target"]).partition(":")[2]


@dataclass
class Project:
    """A project in a folder of its own, and `forge` in it. quick: what runs commands instead of new interpreters."""

    quick: ClassVar[Quick | None] = None
    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def recipe(self) -> Path:
        return self.root / "recipes" / "toy.toml"

    @property
    def output(self) -> Path:
        return self.root / "out" / "toy" / "toy.safetensors"

    @property
    def lock(self) -> str:
        return (self.root / "forge.lock").read_text()

    def edit(self, old: str, new: str, file: str = "recipes/toy.toml") -> None:
        """Replace a text that must stand there."""
        path = self.root / file
        text = path.read_text()
        assert old in text, f"{old!r} is not in {file}"
        path.write_text(text.replace(old, new))

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start `forge` in a session of its own, as a shell would start a job."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("FORGE_", "PYTHONDONTWRITE"))}
        own = {
            "FORGE_METHODS": str(METHODS),
            "REHEARSAL_LOG": str(self.root / "rehearsal.log"),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }
        return subprocess.Popen(
            [str(FORGE), *arguments],
            cwd=self.root,
            env=clean | own | self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def forge(self, *arguments: str, code: int | None = 0, **environment: str) -> Ran:
        """Run `forge` to its end; its exit code must be this one (None: any)."""
        if self.quick:
            ran = self.quick.start(self.root, *arguments, **self.environment | environment).wait()
        else:
            ran = self.real(*arguments, **environment)
        out, err = ran.out, ran.err
        assert "Traceback" not in out + err, err
        assert code is None or ran.code == code, f"exit code {ran.code}\n{out}\n{err}"
        return ran

    def real(self, *arguments: str, **environment: str) -> Ran:
        """Run a real `forge` to its end, also where others are forks."""
        process = self.start(*arguments, **environment)
        try:
            out, err = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return Ran(process.returncode, out, err)

    def build(self, *arguments: str, code: int | None = 0, **environment: str) -> Ran:
        """Run `forge build --json`."""
        return self.forge("build", "--json", *arguments, code=code, **environment)

    def trained(self) -> list[str]:
        """Say what the rehearsals noted since the last question: `start ID`, `step ID N`, `state ID N`."""
        path = self.root / "rehearsal.log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def starts(self) -> list[str]:
        """Name the rehearsals that were begun since the last question."""
        return [line.rpartition(":")[2] for line in self.trained() if line.startswith("start")]

    def clone(self, root: Path) -> Project:
        """Copy what git would hold: no cache, nothing in `out/`."""
        ignored = shutil.ignore_patterns("cache", "out", ".forge", "rehearsal.log", "gate")
        shutil.copytree(self.root, root, ignore=ignored)
        return Project(root, dict(self.environment))


def pytest_collection_finish() -> None:
    """Do once in the processes of a whole run what each of many tests would do."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        from tests import shells
        from tests.quick import import_everything, spare_collector

        import_everything()
        shells.install()
        spare_collector()


@pytest.fixture(scope="session")
def toy_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with random weights. Read only: copy it before you write to it."""
    folder = tmp_path_factory.mktemp("toy") / "base"
    write_checkpoint(folder)
    return folder


@pytest.fixture
def project(tmp_path: Path, toy_checkpoint: Path) -> Project:
    """A project with the chain a → b → c → export of rehearsals."""
    return new_project(tmp_path / "project", toy_checkpoint)


def new_project(root: Path, toy_checkpoint: Path, recipe: str = RECIPE) -> Project:
    """Write a project with one recipe."""
    (root / "recipes").mkdir(parents=True)
    (root / "forge.toml").write_text(FORGE_TOML)
    (root / "recipes" / "toy.toml").write_text(recipe)
    shutil.copytree(toy_checkpoint, root / "base")
    write_drawings(root / "drawings")
    return Project(root)


@pytest.fixture(scope="session")
def quick() -> Iterator[Quick]:
    """Run many builds in little time."""
    from tests.quick import Quick

    found = Quick()
    yield found
    found.close()


@pytest.fixture(scope="module")
def forked(quick: Quick) -> Iterator[None]:
    """Run this module's commands in forks of one process (`Project.start` still starts a real one)."""
    Project.quick = quick
    yield
    Project.quick = None


@pytest.fixture
def wait_for() -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Wait until something is so, at most half a minute."""

    def wait(so: Callable[[], Any]) -> None:
        until = time.monotonic() + 30
        while not so():
            assert time.monotonic() < until, "it did not come to be"
            time.sleep(0.01)

    return wait
