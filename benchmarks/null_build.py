"""How long it takes to find out that nothing has to be done: `python -m benchmarks.null_build`.

Graphs of n targets in recipes of at most 100, five layers each; every target reads a data set of ten pictures, which
its recipe's targets share, and a target of the layer below. `make` and `ninja` get graphs of the same size in the same
run, so that the ratios mean something on a noisy machine. Reported is the CPU time of whole processes (user and
system), the least of several runs: with files that are read only, and byte code compiled.
"""

from __future__ import annotations

import argparse
import compileall
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdforge.session import Session

FORGE = Path(sys.executable).with_name("forge")
METHODS = Path(__file__).parents[1] / "tests" / "methods"
COLUMNS = 20  # of each layer
LAYERS = 5


def write_project(root: Path, base: Path, targets: int) -> None:
    """Write recipes of 100 targets (or fewer), and a data set of one picture for every target."""
    (root / "recipes").mkdir(parents=True)
    shutil.copytree(base, root / "base")
    recipes = max(1, targets // (COLUMNS * LAYERS))
    columns = min(COLUMNS, targets // LAYERS)
    names = [f"r{i}" for i in range(recipes)]
    (root / "forge.toml").write_text(f'default = [{", ".join(map(repr, names))}]\n[source.base]\nfrom = "base"\n')
    for name in names:
        folder = root / "data" / name
        folder.mkdir(parents=True)
        for i in range(10):
            (folder / f"{i}.png").write_bytes(f"{name} {i}".encode())
            (folder / f"{i}.txt").write_text("a square\n")
        tables = [f'family = "sd15"\n[dataset.own]\npath = "data/{name}"\n']
        for layer in range(LAYERS):
            for column in range(columns):
                below = "base" if layer == 0 else f"t{layer - 1}-{column}"
                table = f'[rehearsal.t{layer}-{column}]\non = "{below}"\ndataset = "own"\nrank = {column + 1}\n'
                tables.append(table)
        (root / "recipes" / f"{name}.toml").write_text("\n".join(tables))


def pretend(root: Path) -> None:
    """Give every target a result, as if it had been trained: 10,000 real builds would take hours."""
    from sdforge.artifact import Component
    from sdforge.session import open_session
    from sdforge.store.entries import Result

    session = open_session(root)
    names = session.project.default
    wanted = session.resolve(names)
    session.store.prepare()
    pack = session.store.put_bytes(b"the bytes of all results")
    for _ in range(LAYERS):
        for step in session.plan(wanted).steps.values():
            key = step.content_key or step.key
            if not key or step.result:
                continue
            component = Component(key[::-1], key[::-1], pack, "F16")
            result = Result(key, key, "checkpoint", "sd15", {"text_encoder": component}, packs=(pack,), grade="B")
            session.store.keep(result, step.content_manifest or step.manifest)
    settle(session, wanted)


def settle(session: Session, wanted: list[str]) -> None:
    """Do what a build does at its end."""
    from sdforge.chapters import remember
    from sdforge.lockfile import LockFile

    plan = session.plan(wanted)
    assert not plan.to_do
    remember(session, plan, {}, {})
    LockFile(session).write(plan)


def write_make(root: Path, targets: int) -> None:
    """Write the same graph for make and ninja: text files that are copied."""
    root.mkdir()
    make, ninja = ["all: " + " ".join(f"o{i}" for i in range(targets))], ["rule copy", "  command = cat $in > $out"]
    columns = max(1, targets // LAYERS)
    for i in range(targets):
        (root / f"s{i}").write_text(str(i))
        below = f" o{i - columns}" if i >= columns else ""
        make.append(f"o{i}: s{i}{below}\n\tcat $^ > $@")
        ninja.append(f"build o{i}: copy s{i}{below}")
    (root / "Makefile").write_text("\n".join(make) + "\n")
    (root / "build.ninja").write_text("\n".join(ninja) + "\n")


def measure(command: list[str], root: Path, runs: int) -> tuple[float, float, float]:
    """Return the least CPU and wall seconds of several runs, and the largest memory in MB."""
    cpu, wall, memory = [], [], 0.0
    for _ in range(runs):
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{command}: {process.stderr.read().decode() if process.stderr else ''}")
        wall.append(time.monotonic() - began)
        cpu.append(used.ru_utime + used.ru_stime)
        memory = max(memory, used.ru_maxrss / 1024)
    return min(cpu), min(wall), memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("targets", type=int, nargs="*", default=[10, 1000, 10000])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--pretend", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.pretend:  # in a process of its own, since memory is measured from where this one stands
        pretend(arguments.pretend)
        return
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["FORGE_METHODS"] = str(METHODS)
    compileall.compile_dir(METHODS.parents[1] / "sdforge", quiet=2)
    print(f"{'':16}{'targets':>8}{'CPU s':>9}{'wall s':>9}{'MB':>7}{'CPU to make':>13}")
    with tempfile.TemporaryDirectory() as place:
        base = Path(place) / "base"
        code = (
            f"from pathlib import Path; from tests.toys import write_checkpoint; write_checkpoint(Path({str(base)!r}))"
        )
        subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
        for targets in arguments.targets:
            root = Path(place) / f"forge{targets}"
            write_project(root, base, targets)
            subprocess.run([sys.executable, "-m", "benchmarks.null_build", "--pretend", str(root)], check=True)
            time.sleep(2.5)
            subprocess.run([str(FORGE), "build"], cwd=root, check=True, stdout=subprocess.DEVNULL)
            others = Path(place) / f"make{targets}"
            write_make(others, targets)
            tools = {"make": ["make", "-rs"], **({"ninja": ["ninja", "--quiet"]} if shutil.which("ninja") else {})}
            rows = {}
            for name, command in tools.items():
                subprocess.run([*command, "-j2"], cwd=others, check=True, stdout=subprocess.DEVNULL)
                rows[name] = measure(command, others, arguments.runs)
                shutil.rmtree(others / ".ninja_log", ignore_errors=True)
            rows["forge"] = measure([str(FORGE), "build"], root, arguments.runs)
            for name, (cpu, wall, memory) in rows.items():
                ratio = cpu / rows["make"][0]
                print(f"{name:16}{targets:8}{cpu:9.3f}{wall:9.3f}{memory:7.0f}{ratio:13.1f}", flush=True)


if __name__ == "__main__":
    main()
