"""How long it takes to plan merges of full-size checkpoints: `python -m benchmarks.plan_merges`.

Merges of two SDXL checkpoints with the names and shapes of the real ones; their files are sparse, with two bytes of
their own in every tensor, since plans read headers and digests alone. The results are entered into the store by the
benchmark. Reported is the CPU time of whole processes (user and system), the least of several runs: where the verdict
«nothing to do» is kept, where the plan is made in full, after the weight of one merge has changed, and where nothing
was ever planned before, so that the tensors of every merge are listed.
"""

from __future__ import annotations

import argparse
import compileall
import os
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path

from benchmarks.null_build import FORGE, measure, settle

EACH = 10  # merges of a recipe
MERGE = """[weighted_sum.m{i}]
checkpoints = ["a", "b"]
weights = [{first}, {second}]
blocks = {{ "unet.mid" = [0.5, 0.5], "unet.out*" = [{second}, {first}] }}
"""


def write_checkpoint(path: Path, seed: int) -> int:
    """Write a sparse single file of SDXL in fp16; return how many tensors it holds."""
    from benchmarks.merging.files import shapes
    from sdforge.dtypes import ITEM_SIZE
    from sdforge.families import family
    from sdforge.formats.safetensors import header_bytes, read_header
    from sdforge.formats.single_file import single_pieces

    pieces = single_pieces(family("sdxl"), {place: ("F16", shape) for place, shape in shapes("sdxl").items()})
    first, _ = header_bytes({name: (piece.dtype, piece.shape) for name, piece in pieces.items()}, {})
    with path.open("wb") as file:
        file.write(first)
        file.truncate(len(first) + sum(prod(piece.shape) * ITEM_SIZE[piece.dtype] for piece in pieces.values()))
        for i, entry in enumerate(read_header(path).tensors.values()):
            file.seek(entry.offset)
            file.write((seed * 4096 + i).to_bytes(2, "little"))
    return len(pieces)


def write_project(root: Path, merges: int) -> int:
    """Write two checkpoints, and recipes of ten merges; return how many tensors a checkpoint holds."""
    (root / "recipes").mkdir(parents=True)
    tensors = [write_checkpoint(root / f"{name}.safetensors", seed) for seed, name in enumerate("ab")]
    names = [f"r{i}" for i in range(merges // EACH)]
    sources = "".join(f'[source.{name}]\nfrom = "{name}.safetensors"\n' for name in "ab")
    (root / "forge.toml").write_text(f"default = {names}\n{sources}".replace("'", '"'))
    for r, name in enumerate(names):
        shares = [(i, (r * EACH + i + 1) / 1000) for i in range(EACH)]
        tables = [MERGE.format(i=i, first=round(1 - share, 3), second=share) for i, share in shares]
        (root / "recipes" / f"{name}.toml").write_text('family = "sdxl"\n' + "\n".join(tables))
    return tensors[0]


def pretend(root: Path) -> None:
    """Give every merge a result, as if it had been computed: a hundred real ones would take 500 GB."""
    from sdforge.artifact import Component, Spot
    from sdforge.formula import common_dtype
    from sdforge.identity import component_identity
    from sdforge.session import open_session
    from sdforge.store.entries import Result

    session = open_session(root)
    wanted = session.resolve(session.project.default)
    session.store.prepare()
    session.store.tensors([])  # as a build does, before there are results
    pack = session.store.put_bytes(b"the bytes of all results")
    plan = session.plan(wanted)
    for key, formula in plan.notes.items():
        session.store.note_formula(key, formula)
    for step in plan.steps.values():
        components = {}
        for name, rows in session.planner().formula(step).components.items():
            table = [
                row.tensor._replace(sha256=row.tensor.identity[::-1], xxh3=row.tensor.identity[:32], spot=Spot(pack, 0))
                if row.method
                else row.inputs[0]
                for row in rows
            ]
            identity = component_identity((t.name, t.identity) for t in table)
            content = component_identity((t.name, t.content) for t in table)
            dtype = common_dtype(t.dtype for t in table)
            components[name] = Component(identity, content, session.store.put_table(table), dtype)
        result = Result(step.key, step.key[::-1], "checkpoint", "sdxl", components, packs=(pack,))
        session.store.keep(result, step.manifest)
    settle(session, wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("merges", type=int, nargs="?", default=100)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--pretend", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.pretend:  # in a process of its own, since memory is measured from where this one stands
        pretend(arguments.pretend)
        return
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    compileall.compile_dir(Path(__file__).parents[1] / "sdforge", quiet=2)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "project"
        code = "import sys; from pathlib import Path; from benchmarks.plan_merges import write_project; "
        code += f"print(write_project(Path({str(root)!r}), {arguments.merges}))"
        tensors = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
        print(f"{arguments.merges} merges of {tensors.strip()} tensors", flush=True)
        command = [str(FORGE), "plan"]
        subprocess.run([str(FORGE), "lock"], cwd=root, check=True, stdout=subprocess.DEVNULL)  # hashes the sources
        time.sleep(2.5)
        report("nothing was planned before", measure([str(FORGE), "graph"], root, 1))
        subprocess.run([sys.executable, "-m", "benchmarks.plan_merges", "--pretend", str(root)], check=True)
        time.sleep(2.5)
        subprocess.run([str(FORGE), "build"], cwd=root, check=True, stdout=subprocess.DEVNULL)
        report("nothing to do, the verdict is kept", measure([str(FORGE), "build"], root, arguments.runs))
        report("nothing to do, the plan made in full", measure(command, root, arguments.runs))
        recipe = root / "recipes" / "r0.toml"
        recipe.write_text(recipe.read_text().replace("[0.999, 0.001]", "[0.5, 0.5]"))
        report("after one weight has changed", measure(command, root, arguments.runs))


def report(what: str, measured: tuple[float, float, float]) -> None:
    cpu, wall, memory = measured
    print(f"{what:40}{cpu:9.3f} s CPU{wall:9.3f} s wall{memory:7.0f} MB", flush=True)


if __name__ == "__main__":
    main()
