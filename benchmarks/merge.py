"""Merges and bakes at full size against the floor and against other programs: `python -m benchmarks.merge`.

Checkpoints of random numbers with the names and shapes of the real ones are written first (they stay in `--inputs` for
the next time). Every tool does the same job on the same files, in a process of its own, in turns. Before each the disk
is flushed, what others have written is taken out of the page cache, and the inputs are read into it, as far as there
is room; with `--cold` they are taken out of it. Wall seconds are the least of all rounds, CPU seconds and the peak of
anonymous memory those of that round. Other programs live in environments of their own: `--peer sd-mecha=PYTHON` and so
on; kohya's scripts are found in PYTHONPATH. Their results are compared with the script's, and what holds more memory
than `--most` is killed. The floor's figures are the machine's at that moment: read ratios. The second floor waits
for the disk, as forge does before it says that a file is there; other tools leave that to the system.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.merging.cost import ROOT, Cost, measured
from benchmarks.merging.files import write_checkpoint, write_lora
from benchmarks.merging.page_cache import drop, fill, resident
from sdforge.families import family
from sdforge.formats.safetensors import read_header
from sdforge.formats.single_file import single_pieces

FORGE = Path(sys.executable).with_name("forge")
JOBS = {  # inputs, and the table of a recipe
    "weighted_sum": ("ab", 'weighted_sum.made]\ncheckpoints = ["a", "b"]\nweights = [{rest}, {share}]'),
    "add_difference": ("abc", 'add_difference.made]\na = "a"\nb = "b"\nbase = "c"\nweight = {share}'),
    "bake": ("al", 'bake.made]\ncheckpoint = "a"\nloras = {{ l = {{ strength = {share} }} }}'),
}
PEERS = {"sd-mecha": "mecha.py", "mergekit": "kit.py", "meh": "meh.py", "kohya": "kohya.py"}
OWN = {"floor": "floor.py", "floor, flushed": "flushed.py", "script": "script.py"}
SETTINGS = """[source]
a.from = "a.safetensors"
b.from = "b.safetensors"
c.from = "c.safetensors"
l.from = "l.safetensors"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    place = ROOT / "build" / "merge"
    parser.add_argument("--work", type=Path, default=place, help="a folder with room for six checkpoints of a family")
    parser.add_argument("--inputs", type=Path, help="where checkpoints lie in FAMILY/ or are written; default: --work")
    parser.add_argument("--families", nargs="+", default=["sd15", "sdxl"])
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="take the inputs out of the page cache before each run")
    parser.add_argument("--most", type=float, default=18_000, help="MB of anonymous memory that a tool may hold")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=", ".join(PEERS))
    arguments = parser.parse_args()
    peers = {name: str(Path(python).absolute()) for name, python in (each.split("=", 1) for each in arguments.peer)}
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for name in arguments.families:
        inputs = (arguments.inputs or arguments.work).absolute() / name
        bench = Bench(arguments.work.absolute() / name, inputs, name, arguments.jobs)
        for job in arguments.jobs:
            bench.table(job, How(arguments.rounds, peers, arguments.cold, arguments.most))


class How(NamedTuple):
    """How a job is run: rounds, peer → its Python, inputs out of the page cache, MB that a tool may hold."""

    rounds: int
    peers: dict[str, str]
    cold: bool
    most: float


class Bench:
    """One family's files, and a project that merges them."""

    def __init__(self, work: Path, inputs: Path, name: str, jobs: list[str]) -> None:
        self.work, self.name = work, name
        self.project, self.known = work / "project", work / "known"
        self.inputs = {letter: inputs / f"{letter}.safetensors" for job in jobs for letter in JOBS[job][0]}
        work.mkdir(parents=True, exist_ok=True)
        inputs.mkdir(parents=True, exist_ok=True)
        for seed, letter in enumerate("cab"):
            if letter in self.inputs and not self.inputs[letter].exists():
                write_checkpoint(self.inputs[letter], name, seed)
        if "l" in self.inputs and not self.inputs["l"].with_suffix(".json").exists():
            write_lora(self.inputs["l"], name)
        shutil.rmtree(self.project, ignore_errors=True)
        (self.project / "recipes").mkdir(parents=True)
        (self.project / "forge.toml").write_text(SETTINGS)
        (self.project / "forge.local.toml").write_text(f"folders = [{json.dumps(str(inputs))}]\n")
        for job in jobs:
            self._recipe(job, 0.5)
        if self.known.exists():
            shutil.copytree(self.known, self.project / "cache")
        os.sync()
        seen = [measured([str(FORGE), "plan", f"{job}:made"], self.project) for job in jobs]
        size = sum(path.stat().st_size for path in self.inputs.values()) / 1e9
        again = "again" if self.known.exists() else "for the first time"
        print(f"\n{name}: {size:.1f} GB were seen {again} in {sum(cost.wall for cost in seen):.1f} s", flush=True)
        shutil.rmtree(self.known, ignore_errors=True)
        shutil.copytree(self.project / "cache", self.known)

    def _recipe(self, job: str, share: float) -> None:
        table = JOBS[job][1].format(share=share, rest=round(1 - share, 6))
        text = f'family = "{self.name}"\n[{table}\n[preset]\ncheckpoint = "made"\nexport = ["checkpoint"]\n'
        (self.project / "recipes" / f"{job}.toml").write_text(text)

    def table(self, job: str, how: How) -> None:
        """Run a job with everything, and print a row for each."""
        inputs = [self.inputs[letter] for letter in JOBS[job][0]]
        scripts = {tool: (sys.executable, script) for tool, script in OWN.items()}
        scripts |= {peer: (python, PEERS[peer]) for peer, python in how.peers.items()}
        costs: dict[str, list[Cost]] = {}
        apart: dict[str, str] = {}
        here: list[float] = []
        for i in range(how.rounds):
            share = round(0.3 + 0.01 * i, 2)
            outs = {tool: self.work / f"out-{tool}.safetensors" for tool in scripts}
            for tool, (python, script) in scripts.items():
                place = ROOT / "benchmarks" / "merging" / script
                command = [python, str(place), job, str(share), str(outs[tool]), *map(str, inputs)]
                here.append(self._ready(inputs, cold=how.cold))
                self._run(costs, tool, command, self.work, how.most)
                if tool not in OWN and outs[tool].exists():
                    apart[tool] = _apart(_file(outs[tool]), _file(outs["script"]))
                if tool != "script":
                    outs[tool].unlink(missing_ok=True)
            self._run(costs, "import torch", [sys.executable, "-c", "import torch"], self.work, how.most)
            for tool, wanted in (("forge: target", f"{job}:made"), ("forge: target and file", job)):
                self._fresh(job, share)
                here.append(self._ready(inputs, cold=how.cold))
                self._run(costs, tool, [str(FORGE), "build", wanted], self.project, how.most)
                if tool in costs and len(costs[tool]) == i + 1:
                    apart[tool] = _apart(self._pack() if wanted != job else self._exported(), _file(outs["script"]))
            outs["script"].unlink()
            shutil.rmtree(self.project / "cache")
            shutil.rmtree(self.project / "out", ignore_errors=True)
        _print(f"{job}, {self.name}, of the inputs {min(here):.0%} to {max(here):.0%} in memory", costs, apart)

    def _ready(self, inputs: list[Path], *, cold: bool) -> float:
        """Let the page cache hold the inputs, or with `cold` none of them, and nothing that others have written.

        Returns the least share of an input that it holds.
        """
        os.sync()
        for path in (*self.work.glob("*.safetensors"), *self.inputs.values()):
            if cold or path not in inputs:
                drop(path)
        if not cold:
            for path in inputs:
                fill(path)
        return min(map(resident, inputs))

    def _fresh(self, job: str, share: float) -> None:
        """Leave the project as it was when it had seen its sources and made nothing."""
        shutil.rmtree(self.project / "cache", ignore_errors=True)
        shutil.rmtree(self.project / "out", ignore_errors=True)
        shutil.copytree(self.known, self.project / "cache")
        (self.project / "forge.lock").unlink(missing_ok=True)
        self._recipe(job, share)

    def _run(self, costs: dict[str, list[Cost]], tool: str, command: list[str], folder: Path, most: float) -> None:
        try:
            costs.setdefault(tool, []).append(measured(command, folder, most=most))
        except subprocess.CalledProcessError as error:
            if error.returncode != 64:  # it has no such job
                print(
                    f"{tool}: {' '.join(command)} ended with {error.returncode}\n{error.stderr[-2000:]}",
                    file=sys.stderr,
                )
            if not costs[tool]:
                del costs[tool]

    def _pack(self) -> dict[str, tuple[Path, int, int]]:
        """Return single-file name → where the bytes lie that a build has put into the store."""
        found: dict[tuple[str, str], tuple[str, tuple[int, ...], Path, int]] = {}
        for path in (self.project / "cache" / "v1" / "objects").glob("*/*"):
            if path.stat().st_size > 1 << 22:
                for name, entry in read_header(path).tensors.items():
                    component, _, canonical = name.partition(".")
                    found[component, canonical] = entry.dtype, entry.shape, path, entry.offset
        shapes = {place: (dtype, shape) for place, (dtype, shape, _, _) in found.items()}
        return {
            single: (found[piece.parts[0]][2], found[piece.parts[0]][3], _size(piece.shape))
            for single, piece in single_pieces(family(self.name), shapes).items()
            if len(piece.parts) == 1 and not piece.turned
        }

    def _exported(self) -> dict[str, tuple[Path, int, int]]:
        (path,) = (self.project / "out").rglob("*.safetensors")
        return _file(path)


def _file(path: Path) -> dict[str, tuple[Path, int, int]]:
    return {name: (path, entry.offset, _size(entry.shape)) for name, entry in read_header(path).tensors.items()}


def _size(shape: tuple[int, ...]) -> int:
    found = 1
    for edge in shape:
        found *= edge
    return found


def _apart(ours: dict[str, tuple[Path, int, int]], theirs: dict[str, tuple[Path, int, int]]) -> str:
    """Say how many fp16 numbers differ, and by how many units in the last place at most.

    The VAE is left out: forge takes it from the first checkpoint unless a recipe says otherwise.
    """
    differ, total, most = 0, 0, 0
    for name in (name for name in ours.keys() & theirs.keys() if not name.startswith("first_stage_model.")):
        a, b = (np.memmap(path, np.int16, "r", place, size) for path, place, size in (ours[name], theirs[name]))
        other = a != b
        differ += int(np.count_nonzero(other))
        total += a.size
        most = max(most, int(np.abs(_ordered(a[other]) - _ordered(b[other])).max(initial=0)))
    return f"{differ / max(1, total):.2%} by ≤ {most} ulp"


def _ordered(bits: Any) -> Any:
    """Return fp16 numbers as whole ones in their order: neighbours are one apart."""
    wide = bits.astype(np.int32)
    return np.where(wide < 0, -(wide & 0x7FFF), wide)


def _print(title: str, costs: dict[str, list[Cost]], apart: dict[str, str]) -> None:
    best = {tool: min(found) for tool, found in costs.items()}
    floor, flushed, start = best["floor"].wall, best["floor, flushed"].wall, best.pop("import torch")
    print(f"\n{title}; `import torch` {start.wall:.2f} s; load {os.getloadavg()[0]:.1f}\n")
    print(
        "| tool | wall s | × floor | × floor, flushed | without torch's import, × floor | CPU s | MB anonymous "
        "| differs from the script |"
    )
    print("| --- | --: | --: | --: | --: | --: | --: | --- |")
    for tool, cost in best.items():
        beyond = f"{(cost.wall - start.wall) / floor:.1f}" if tool.startswith("forge") else ""
        ratios = [f"{cost.wall / floor:.1f}", f"{cost.wall / flushed:.1f}", beyond]
        row = [tool, f"{cost.wall:.1f}", *ratios, f"{cost.cpu:.1f}", f"{cost.anonymous:.0f}"]
        print(f"| {' | '.join(row)} | {apart.get(tool, '')} |", flush=True)


if __name__ == "__main__":
    main()
