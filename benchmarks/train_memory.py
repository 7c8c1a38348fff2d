"""What trainings need of a machine's memory, and what they would ask of a cluster: `python -m benchmarks.train_memory`.

Two steps on the CPU, batch 1, edge 64, of a checkpoint with random weights in the shapes of Stable Diffusion 1.5 (its
VAE is the demo's) and of the demo's own. The peak is the resident memory of the largest process of a real build.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

FORGE = Path(sys.executable).with_name("forge")
DEMO = Path(__file__).parents[1] / "recipes" / "bases" / "flat"
METHODS = ("lora", "textual_inversion", "fine_tune")
FORGE_TOML = """\
[source.base]
from = "base"

[dataset.drawings]
path = "drawings"
trigger = "<toy>"
"""
RECIPE = """\
family = "sd15"

[{method}.learned]
on = "base"
dataset = "drawings"
batch = 1
steps = 2
resolution = 64
"""
WORD = 'token = "<toy>"\ninit = "cat"\n'


def write_project(root: Path, *, full: bool) -> None:
    """Write a base and drawings. In a process of its own: what it takes counts for all that it starts later."""
    from benchmarks.train_full_size import FULL, write_base
    from tests.toys import write_drawings

    (root / "recipes").mkdir(parents=True)
    write_drawings(root / "drawings")
    (root / "forge.toml").write_text(FORGE_TOML)
    if full:
        write_base(root / "base", FULL["SD1.5 at 512"])
    else:
        shutil.copytree(DEMO, root / "base")


def asked(root: Path) -> int:
    """Return the bytes that the training would ask a cluster for."""
    with os.popen(f"{FORGE} -C {root} plan r --on slurm --json") as said:
        (action,) = json.loads(said.read())["actions"]
    return int(action["resources"]["memory"])


def peak(root: Path) -> int:
    """Build, and return the resident bytes of the largest process."""
    command = [str(FORGE), "-C", str(root), "build", "r", "--device", "cpu", "--json"]
    quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    process = os.posix_spawn(FORGE, command, os.environ, file_actions=quiet)
    _, status, used = os.wait4(process, 0)
    assert status == 0, f"`{' '.join(command)}` failed"
    return used.ru_maxrss * 1024


def main() -> None:
    print("| base | method | peak GB | asked for, GB |\n| --- | --- | --: | --: |")
    for full in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "project"
            writer = multiprocessing.get_context("spawn").Process(
                target=write_project, args=(root,), kwargs={"full": full}
            )
            writer.start()
            writer.join()
            for method in METHODS:
                text = RECIPE.format(method=method) + (WORD if method == "textual_inversion" else "")
                (root / "recipes" / "r.toml").write_text(text)
                wanted = asked(root)
                name = "SD1.5" if full else "demo"
                print(f"| {name} | {method} | {peak(root) / 1e9:.1f} | {wanted / 1e9:.1f} |", flush=True)


if __name__ == "__main__":
    main()
