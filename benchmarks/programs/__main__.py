"""`python -m benchmarks.programs WORK sd15 comfyui=FOLDER,PYTHON,VERSION …`: open a preset's files in other programs.

FOLDER is the program's own checkout, PYTHON the interpreter of an environment in which it runs, VERSION what the table
is to call it. WORK gets full-size presets of random numbers (10 GB of Stable Diffusion 1.5), which are kept and used
again, a folder for each program into which `forge install` puts them, and a JSON of what was found.
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

from benchmarks.programs.places import write_places
from benchmarks.programs.preset import PRESETS, forge, make
from sdforge.families import family
from sdforge.install.layouts import LAYOUTS

HERE = Path(__file__).parent


class Program(NamedTuple):
    """A program to try: a script of this folder, its checkout, an interpreter, and what it is called."""

    name: str
    folder: Path
    python: Path
    version: str


def program(text: str) -> Program:
    name, _, rest = text.partition("=")
    folder, python, version = rest.split(",")
    return Program(name, Path(folder).resolve(), Path(python).absolute(), version)


def project(work: Path, kind: str) -> Path:
    """Return a project whose presets are built, with what diffusers makes of them beside it."""
    root = work.resolve() / kind
    if not (root / "forge.toml").is_file():
        make(root, kind)
    if not (root / "reference.safetensors").is_file():
        write_places(root, family(kind))
        # in a process of its own, whose memory a program needs after it
        subprocess.run([sys.executable, "-m", "benchmarks.programs.reference", str(root)], check=True)
    return root


def home_of(root: Path, name: str) -> Path:
    """Return a program's folder of models, in which the presets lie; kohya's scripts have none."""
    home = root / "homes" / name
    if name in LAYOUTS and not home.is_dir():
        for mark in LAYOUTS[name].marks:
            place = home / mark
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch() if place.suffix else place.mkdir()
        for preset in PRESETS if LAYOUTS[name].whole else PRESETS[:-1]:  # the last one is a folder alone
            forge(root, "install", preset, "--into", f"{name}:{home}")
        # they lie in no preset, since nobody has made them
        folder = home / LAYOUTS[name].folders["lora"]
        folder.mkdir(parents=True, exist_ok=True)
        for lora in (root / "loras").glob("*/*.safetensors"):
            shutil.copyfile(lora, folder / lora.name)
    return home


def tried(root: Path, each: Program, stubs: Path | None) -> list[dict[str, Any]]:
    """Run a program's script in its own environment; return what it found."""
    out = root / f"{each.name}.json"
    home = home_of(root, each.name)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = {"PYTHONPATH": str(stubs.resolve())} if stubs else {}
    command = [str(each.python), str(HERE / f"{each.name}.py"), *map(str, (root, each.folder, home, out))]
    with (root / f"{each.name}.log").open("w") as log:
        ended = subprocess.run(command, cwd=each.folder, env=clean | path, stdout=log, stderr=log, check=False)
    if ended.returncode:
        return [{"what": "", "said": [], "failed": f"its script ended with {ended.returncode}: see {log.name}"}]
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


def table(each: Program, rows: list[dict[str, Any]]) -> None:
    """Print what was opened. Numbers are distances from ours, as shares of what is compared."""
    print(f"\n**{each.version}**\n\n| file | taken for | distance from ours | said |\n| --- | --- | --- | --- |")
    for row in rows:
        apart = [
            f"{name} {row[name]:.1g}"
            for name in ("context", "pooled", "noise", "picture", "rows", "layers")
            if name in row
        ]
        apart += [f"change {row['apart']:.1g}"] if row.get("apart") is not None else []
        apart += [f"{len(row[name])} of {row['modules']} {name}" for name in ("missing", "unchanged") if name in row]
        said = [row["failed"]] if "failed" in row else []
        said += [f"{len(row['said'])} lines, first: {row['said'][0][:90]}"] if row["said"] else []
        print(f"| {row['what']} | {row.get('kind', '')} | {', '.join(apart)} | {'; '.join(said)} |")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.programs", description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("family", choices=("sd15", "sdxl"))
    parser.add_argument("programs", nargs="*", type=program, metavar="NAME=FOLDER,PYTHON,VERSION")
    parser.add_argument("--stubs", type=Path, help="a folder of modules that a program imports and does not use")
    wishes = parser.parse_intermixed_args()
    root = project(wishes.work, wishes.family)
    for each in wishes.programs:
        table(each, tried(root, each, wishes.stubs))


if __name__ == "__main__":
    main()
