"""Where cases run: toy projects that were built without a fault, clones of them, and what must be so after a fault."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tests.calls import NUMBERS, Decide
from tests.conftest import FORGE_TOML, Ran, new_project
from tests.quick import WATCHED, Quick
from tests.survival import RECIPE, Whole, leftovers
from tests.toys import write_checkpoint

ROOT = Path(__file__).parents[2]
FORGE = Path(sys.executable).with_name("forge")
OFTEN = ("openat", "fchown", "fdatasync", "pwrite64", "write", "copy_file_range", "sendfile")
RARE = tuple(name for name in NUMBERS if name not in OFTEN)
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
LATE = (  # what a build imports when it comes to it; a fork has it already
    *("PIL.ImageFont", "PIL.PngImagePlugin", "numpy.random", "concurrent.futures.thread", "difflib", "sdforge.verdict"),
    *("sdforge.families.sd15", "sdforge.import_step", "sdforge.report.page", "sdforge.report.sheet", "sdforge.verify"),
)
TORCH = (*LATE, "torch", "diffusers", "transformers", "sdforge.run.train", "sdforge.run.formula")

Problems = list[str]


class Found(NamedTuple):
    """What a case found. tried: how many things; facts: figures, of which the least is kept."""

    kind: str
    problems: Problems
    tried: int = 1
    facts: Mapping[str, float] = MappingProxyType({})


class Bench:
    """The place in which cases run, and the toy that was built without a fault.

    known: its system calls, as an earlier call of the benchmark has counted them; numbers of cases rest on them.
    """

    def __init__(self, place: Path, known: list[list[Any]] | None = None) -> None:
        self.place, self.known = place, known
        self.quick = Quick(*LATE)
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

    def watched(self, root: Path, names: Iterable[str], decide: Decide) -> tuple[Ran, Counter[str]]:
        """Run a build on whose calls of these names `decide` decides; return how many of each there were."""
        running = self.quick.start(root, "build", "--json", **{WATCHED: " ".join(names)})
        counts = running.watch(decide)
        return running.wait(), counts

    @cached_property
    def calls(self) -> list[tuple[str, int]]:
        """The points of a build at which the system is asked to change something: (call, how manieth of its name)."""
        if self.known:
            return [(name, n) for name, n in self.known]
        with self.clone() as root:
            _, counts = self.watched(root, RARE + OFTEN, lambda *_: "")
        rare, often = ([(name, n) for name in names for n in range(1, counts[name] + 1)] for names in (RARE, OFTEN))
        random.Random(1).shuffle(often)
        return rare + often


def at(where: str, problems: Problems) -> Problems:
    """Say of each problem where it was."""
    return [f"{where}: {problem}" for problem in problems]


def workers(pid: int) -> list[int]:
    """Return the children of a process."""
    try:
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
