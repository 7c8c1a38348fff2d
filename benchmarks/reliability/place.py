"""Where cases run: toy projects that were built without a fault, clones of them, and what must be so after a fault."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from tests.conftest import FORGE_TOML, Ran, new_project
from tests.quick import TRACED, Quick
from tests.survival import RECIPE, Whole, leftovers
from tests.toys import write_checkpoint

ROOT = Path(__file__).parents[2]
FORGE = Path(sys.executable).with_name("forge")
CALLS = ("fsync", "rename", "unlink", "unlinkat", "rmdir", "mkdir", "fchmod", "ftruncate", "pwrite64", "write")
TRAINING = """\
family = "sd15"

[textual_inversion.word]
on = "base"
dataset = "drawings"
token = "<toy>"
steps = 6
resolution = 64

[preset]
checkpoint = "base"
insert = ["word"]
"""
EVERY, STEPS = 2, 6  # steps between states of the rehearsal, and of all
TORCH = ("torch", "diffusers", "transformers", "sdforge.run.train", "sdforge.run.formula")

Problems = list[str]


class Found(NamedTuple):
    """What a case found. count: how many things it tried; facts: figures, of which the least is kept."""

    kind: str
    problems: Problems
    count: int = 1
    facts: Mapping[str, float] = MappingProxyType({})


class Bench:
    """The place in which cases run, and the toy that was built without a fault."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.quick = Quick()
        self.base = place / "base"
        write_checkpoint(self.base)
        self.whole = self._built(self.quick, place / "whole", RECIPE, FORGE_TOML)

    def _built(self, quick: Quick, root: Path, recipe: str, settings: str) -> Whole:
        new_project(root, self.base, recipe)
        (root / "forge.toml").write_text(settings)
        ran = quick.forge(root, "build", "--json")
        assert ran.code == 0, ran.out + ran.err
        return Whole(root)

    @cached_property
    def torch(self) -> Quick:
        """Commands in forks of a process that has torch and diffusers."""
        return Quick(*TORCH)

    @cached_property
    def trained(self) -> Whole:
        """A real training of the toy, with a state at every step."""
        states = "\n[run]\nstates = { steps = 1 }\n"
        return self._built(self.torch, self.place / "trained", TRAINING, FORGE_TOML + states)

    def close(self) -> None:
        self.quick.close()
        if "torch" in self.__dict__:
            self.torch.close()

    @contextmanager
    def clone(self, whole: Whole | None = None, *, built: bool = False) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(dir=self.place, prefix="case-"))
        found = whole or self.whole
        try:
            yield (found.copy if built else found.clone)(folder / "project")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def mends_itself(self, root: Path, whole: Whole | None = None, *, kills: int = 0) -> Problems:
        """Say what is wrong after a fault: nothing half, one more build mends all, and no more work than promised."""
        quick = self.torch if whole else self.quick
        whole, problems = whole or self.whole, []
        seen = quick.forge(root, "verify", "--json")
        if seen.code != 0:
            problems.append(f"verify after the fault: {seen.out[-300:]}{seen.err[-300:]}")
        ran = quick.forge(root, "build", "--json")
        if ran.code != 0 or "Traceback" in ran.out + ran.err:
            problems.append(f"the next build: {ran.code} {ran.out[-300:]}{ran.err[-300:]}")
        if not ran.built and not ran.restored:  # a build with nothing to do changes no file, so it sweeps nothing
            quick.forge(root, "clean")
        problems += whole.differences(root) + leftovers(root)
        if (again := quick.forge(root, "build", "--json").built) != []:
            problems.append(f"built once more: {again}")
        log = root / "rehearsal.log"
        steps = [line for line in log.read_text().splitlines() if line.startswith("step")] if log.is_file() else []
        if kills and len(steps) - len(set(steps)) > kills * (EVERY + 1):
            problems.append(f"{len(steps) - len(set(steps))} steps run twice after {kills} kills")
        return problems

    def traced(self, root: Path, *options: str) -> Ran:
        """Run a build under strace, from its first own call on."""
        running = self.quick.start(root, "build", "--json", **{TRACED: "1"})
        tracer = subprocess.Popen(["strace", "-f", "-qq", "-p", str(running.pid), *options], stderr=subprocess.DEVNULL)
        ran = running.end()
        tracer.wait(timeout=60)
        return ran

    @cached_property
    def calls(self) -> list[tuple[str, int]]:
        """The points of a build at which the system is asked to change something: (call, how manieth)."""
        with self.clone() as root:
            log = root.parent / "calls"
            self.traced(root, "-o", str(log), "-e", f"trace={','.join(CALLS)}")
            text = log.read_text(errors="replace")
        counts = {name: len(re.findall(rf"^\d+ +{name}\(", text, re.M)) for name in CALLS}
        rare = [(name, n) for name in CALLS[:-2] for n in range(1, counts[name] + 1)]
        writes = [(name, n) for name in CALLS[-2:] for n in range(1, counts[name] + 1)]
        random.Random(1).shuffle(writes)
        return rare + writes


def at(where: str, problems: Problems) -> Problems:
    """Say of each problem where it was."""
    return [f"{where}: {problem}" for problem in problems]


def workers(pid: int) -> list[int]:
    """Return the children of a process."""
    try:
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
