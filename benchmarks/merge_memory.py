"""What memory each merge, bake and edit of LoRAs takes at SDXL's size: `python -m benchmarks.merge_memory`.

Every registered merge, the bake of every kind of LoRA, and what makes LoRAs of checkpoints or of LoRAs is built by
`forge build` from files, and the anonymous memory of the command, its worker and the worker's processes is added up
every few milliseconds. Files are `thin` unless `--full`: all names of SDXL, of every shape in a network (the VAE, which
nothing here computes, aside) two tensors as large as the real ones, and crumbs in place of the others. Peaks come from
the largest tensors and from how many are in work at once, so they are those of 6.9 GB; seconds are not.
"""

from __future__ import annotations

import argparse
import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.merge_methods import SETTINGS
from benchmarks.merging.adapters import KINDS, RANKLESS, write_adapter
from benchmarks.merging.cost import ROOT, Cost, measured
from benchmarks.merging.files import Shapes, shapes, thin_shapes, write_checkpoint
from sdforge.method import method_groups, module_of

FORGE = Path(sys.executable).with_name("forge")
FAMILY = "sdxl"
BOUND, ELEMENTWISE_BOUND = 1500, 500  # MB
RANKS = (8, 128)
RESIZED = ("LoRA, LoCon", "LoCon, Tucker", "LoHa", "LoHa, Tucker", "LoKr", "LoKr, whole", "differences")
TICK = 0.01  # seconds between looks
CHECKPOINTS = ("a", "b", "c")


class Job(NamedTuple):
    """A target: its name in the table, the tables of a recipe that end in `made`, the LoRAs they name, its bound."""

    title: str
    tables: str
    loras: tuple[tuple[str, int], ...] = ()
    bound: int = BOUND


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "memory", help="a folder with room for the files")
    parser.add_argument("--full", action="store_true", help="files of 6.9 GB; a, b and c of --work are taken if there")
    parser.add_argument("--list", action="store_true", help="print the titles of all jobs")
    parser.add_argument("jobs", nargs="*", default=["*"], metavar="TITLE", help="patterns of the shell; default: all")
    arguments = parser.parse_args()
    chosen = [job for job in jobs() if any(fnmatch(job.title, each) for each in arguments.jobs)]
    if arguments.list:
        print("\n".join(job.title for job in chosen))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    whole = shapes(FAMILY)
    own = whole if arguments.full else thin_shapes(FAMILY)
    place = Place(arguments.work, own, {name: shape for name, shape in own.items() if shape == whole[name]})
    print("| job | MB anonymous | bound | wall s | CPU s |\n| --- | --: | --: | --: | --: |")
    for job in chosen:
        cost = place.run(job)
        beyond = " beyond" if cost.anonymous > job.bound else ""
        row = f"{cost.anonymous:.0f}{beyond} | {job.bound} | {cost.wall:.1f} | {cost.cpu:.1f}"
        print(f"| {job.title} | {row} |", flush=True)


class Place:
    """Files, and a project that builds from them. whole: the tensors of full size, which LoRAs change."""

    def __init__(self, work: Path, own: Shapes, whole: Shapes) -> None:
        self.work, self.whole = work, whole
        self.project, self.known = work / "project", work / "known"
        for seed, name in enumerate(CHECKPOINTS):
            if not (work / f"{name}.safetensors").exists():
                write_checkpoint(work / f"{name}.safetensors", FAMILY, seed, own)
        shutil.rmtree(self.known, ignore_errors=True)
        self._write([*CHECKPOINTS], merge("add_difference"))
        measured([str(FORGE), "plan", "job:made"], self.project)
        shutil.move(self.project / "cache", self.known)

    def run(self, job: Job) -> Cost:
        """Build a target that was never built; sources have been seen before. Ends the program where that fails."""
        names = [*CHECKPOINTS, *(f"l{i}" for i in range(len(job.loras)))]
        for name, (kind, rank) in zip(names[len(CHECKPOINTS) :], job.loras, strict=True):
            write_adapter(self.work / f"{name}.safetensors", FAMILY, self.whole, kind, rank)
        self._write(names, job)
        shutil.copytree(self.known, self.project / "cache")
        try:
            measured([str(FORGE), "plan", "job:made"], self.project)
            return measured([str(FORGE), "build", "job:made"], self.project, tick=TICK, share=1)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{job.title}: {error.stderr}")
        finally:
            shutil.rmtree(self.project, ignore_errors=True)
            for name in names[len(CHECKPOINTS) :]:
                (self.work / f"{name}.safetensors").unlink(missing_ok=True)

    def _write(self, names: list[str], job: Job) -> None:
        """Write a project whose sources have these names."""
        shutil.rmtree(self.project, ignore_errors=True)
        (self.project / "recipes").mkdir(parents=True)
        sources = "".join(f'{name}.from = "{name}.safetensors"\n' for name in names)
        (self.project / "forge.toml").write_text(f"[source]\n{sources}")
        (self.project / "forge.local.toml").write_text('folders = [".."]\n')
        (self.project / "recipes" / "job.toml").write_text(f'family = "{FAMILY}"\n{job.tables}')


def jobs() -> Iterator[Job]:
    """Yield everything that is measured."""
    yield from (merge(name) for name, group in sorted(method_groups().items()) if group == "merges")
    for kind in KINDS:
        for rank in RANKS[:1] if kind in RANKLESS else RANKS:
            ranked = "" if kind in RANKLESS else f", {'edge' if 'OFT' in kind else 'rank'} {rank}"
            yield Job(f"bake of {kind}{ranked}", _bake(1), ((kind, rank),))
    yield Job("bake of three LoRAs, rank 128", _bake(3), (("LoRA, LoCon", RANKS[-1]),) * 3)
    yield Job("bake of LoRA to fp32, rank 128", f'{_bake(1)}dtype = "fp32"\n', (("LoRA, LoCon", RANKS[-1]),))
    for rank in (*RANKS, 0):
        title = f"rank {rank}" if rank else "any rank"
        yield Job(f"extract, {title}", f'[extract.made]\ntuned = "b"\nbase = "a"\nrank = {rank}\n')
    for kind in RESIZED:
        ranked = "" if kind in RANKLESS else f", {RANKS[-1]}"
        resized = f'[resize.made]\nlora = "l0"\nrank = {RANKS[0]}\n'
        yield Job(f"resize {kind}{ranked} to {RANKS[0]}", resized, ((kind, RANKS[-1]),))
    side = "[lora_merge.{name}]\nloras = {{ l0 = {{ strength = 0.5 }}, l1 = {{ strength = 0.5 }} }}\n"
    two = (("LoRA, LoCon", RANKS[-1]),) * 2
    yield Job("lora_merge, rank 128 twice", side.format(name="made"), two)
    yield Job("lora_merge of differences twice", side.format(name="made"), (("differences", 0),) * 2)
    reduced = f'{side.format(name="both")}[resize.made]\nlora = "both"\nrank = {RANKS[-1]}\n'
    yield Job("lora_merge by SVD, rank 128 twice to 128", reduced, two)


def merge(name: str) -> Job:
    """Return a merge with its defaults of as many checkpoints as there are, or as it takes."""
    module = module_of("merges", name)
    parameters = inspect.signature(getattr(module, name)).parameters.values()
    named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    several = [p.name for p in parameters if p.kind is p.VAR_POSITIONAL]
    settings: dict[str, Any] = {key: value for key, value in SETTINGS.get(name, {}).items() if key != "tensor"}
    given: dict[str, Any] = dict(zip(named, CHECKPOINTS, strict=False))
    for role in several:
        given[role] = list(CHECKPOINTS[len(named) : 2 if "weights" in settings else None])
    first = ""
    if "delta" in given:
        given["delta"], first = "learned", '[subtract.learned]\na = "b"\nb = "c"\n'
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in (given | settings).items())
    bound = ELEMENTWISE_BOUND if getattr(module, "ELEMENTWISE", False) else BOUND
    return Job(name, f"{first}[{name}.made]\n{lines}", bound=bound)


def _bake(count: int) -> str:
    loras = ", ".join(f"l{i} = {{ strength = 0.5 }}" for i in range(count))
    return f'[bake.made]\ncheckpoint = "a"\nloras = {{ {loras} }}\n'


if __name__ == "__main__":
    main()
