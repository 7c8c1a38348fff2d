"""Many builds in little time: one process has imported `forge`, and a fork of it runs each command.

A whole build of the toy takes a tenth of the time that a new interpreter with a worker would need: there is nothing to
import, and orders run in the command's own process. So the publishes of builder and worker are counted in one row, and
a test can go through all of them. A fork that is killed dies as a command would.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests import calls
from tests.conftest import METHODS, RECIPE, Ran

ROOT = Path(__file__).parents[1]
LIBRARIES = (  # what modules of sdforge import within functions, as far as it is installed
    "PIL.ImageDraw",
    "PIL.ImageFont",
    "cryptography.hazmat.primitives.serialization",
    "obstore.store",
    "transformers.models.clip.tokenization_clip",
)
WATCHED = "QUICK_WATCHED"  # system calls of a command on which `Running.watch` decides
LONGEST = 240  # seconds of a command: one that waits for ever is a failure, and dies by SIGALRM


class Here:
    """An executor that runs an order at once, in this process."""

    elsewhere = False

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def expect(self) -> None:
        """Everything is here already."""

    def submit(self, order: Any, log: str, lock: int) -> Any:  # noqa: ARG002 -- the executor's seam
        from sdforge.executors.inline import Inline

        return Inline(order)

    def close(self) -> None:
        """There is nobody to send home."""


class Quick:
    """Runs `forge` in forks of a process that waits for commands on its standard input.

    modules: what that process imports besides the command line, so that no fork has to; none: all that there is.
    """

    def __init__(self, *modules: str) -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("FORGE_", "PYTHONDONTWRITE"))}
        own = {"FORGE_METHODS": str(METHODS), "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
        own |= {"QUICK_MODULES": " ".join(modules)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.quick"],
            cwd=ROOT,
            env=clean | own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, root: Path, *arguments: str, **environment: str) -> Running:
        """Begin a command in a project's folder."""
        assert self.process.stdin
        assert self.process.stdout
        own = {"REHEARSAL_LOG": str(root / "rehearsal.log")}
        wish = {"at": str(root), "arguments": arguments, "environment": own | environment}
        self.process.stdin.write(json.dumps(wish) + "\n")
        self.process.stdin.flush()
        pid, place = json.loads(self.process.stdout.readline())
        return Running(self, pid, Path(place))

    def forge(self, root: Path, *arguments: str, **environment: str) -> Ran:
        """Run a command to its end; a killed one has the code −9."""
        return self.start(root, *arguments, **environment).wait()

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=10)


class Running:
    """A fork at work; its output lies in a folder until `wait` takes it."""

    def __init__(self, quick: Quick, pid: int, place: Path) -> None:
        self.quick, self.pid, self.place = quick, pid, place

    def watch(self, decide: calls.Decide) -> Counter[str]:
        """Decide on its watched calls until it ends; return how many of each there were."""
        return calls.watch(self.pid, self.place / "listener", decide)

    def wait(self) -> Ran:
        assert self.quick.process.stdin
        assert self.quick.process.stdout
        self.quick.process.stdin.write(json.dumps({"wait": self.pid}) + "\n")
        self.quick.process.stdin.flush()
        code = json.loads(self.quick.process.stdout.readline())
        out, err = ((self.place / name).read_text(errors="replace") for name in ("out", "err"))
        for path in (*self.place.iterdir(), self.place):
            path.rmdir() if path.is_dir() else path.unlink()
        return Ran(code, out, err)


def spare_collector() -> None:
    """Let the garbage collector pass over all that there is now, and look less often.

    In a run of many tests it went through it again and again; in a fork it would copy every page that it touches.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def import_everything() -> None:
    """Import all of sdforge, and so the libraries."""
    import sdforge

    for module in pkgutil.walk_packages(sdforge.__path__, "sdforge."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def build_shells() -> None:
    """Load the toy once, so that the forks that load it have its networks already."""
    import torch

    from sdforge.families.sd15.load import load
    from tests import shells
    from tests.families.workbench import take
    from tests.toys import write_checkpoint

    shells.install()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder, "base"))
        load(take(Path(folder, "base")).given(), torch.device("cpu"), torch.float32)


def serve() -> None:
    """Fork for every command that comes; say its process id at once, and its exit code when asked."""
    import sdforge.commands
    import sdforge.housekeeping
    import sdforge.run.__main__
    from sdforge.recipe import read_recipe

    read_recipe(RECIPE.encode(), "toy", "toy.toml")  # what that imports, no fork has to
    sdforge.commands.LocalExecutor = Here  # type: ignore[misc,assignment]
    if modules := os.environ["QUICK_MODULES"].split():
        for name in modules:
            importlib.import_module(name)
    else:
        import_everything()
        build_shells()
    spare_collector()
    for line in sys.stdin:
        wish = json.loads(line)
        if "wait" in wish:
            _, status = os.waitpid(wish["wait"], 0)
            print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
            continue
        place = tempfile.mkdtemp(prefix="quick-")
        for name in ("out", "err"):
            Path(place, name).touch()  # also if the command is killed before it can write
        if not (pid := os.fork()):
            run(wish, place)
        print(json.dumps([pid, place]), flush=True)


def run(wish: dict[str, Any], place: str) -> None:
    """Be a command: never returns."""
    from sdforge.cli import main

    signal.alarm(LONGEST)
    for name, stream in (("out", 1), ("err", 2)):
        fd = os.open(f"{place}/{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(fd, stream)
        os.close(fd)
    os.environ.update(wish["environment"])
    os.chdir(wish["at"])
    if names := os.environ.pop(WATCHED, "").split():
        calls.listen(names, Path(place, "listener"))
    code = 70
    try:
        code = main(wish["arguments"])
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
