"""How long the demo's preset takes, by phase: `python -m benchmarks.preset_build`.

Builds `anime-preset` in a copy of the project without cache and lock, through the real command, then once more with
nothing to do, and once after `rank` has changed and changed back. Alone on the machine, or the figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FORGE = Path(sys.executable).with_name("forge")


def build(root: Path, *arguments: str) -> tuple[float, float, list[dict[str, Any]]]:
    """Return wall seconds, CPU seconds (children included) and the events of a build."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [str(FORGE), "build", "--json", *arguments]
    ran = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - began, cpu, [json.loads(line) for line in ran.stdout.splitlines()]


def say(what: str, wall: float, cpu: float, events: list[dict[str, Any]]) -> None:
    print(f"\n{what}: {wall:.1f} s, {cpu:.1f} s of CPU")
    for event in events:
        if event["event"] == "action" and event["state"] == "built":
            done = "restored" if event["restore"] else "built"
            print(f"  {event['target'].partition(':')[2]:18}{event['method']:20}{done:10}{event['seconds']:8.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=0, help="actions side by side; default: as forge.toml says")
    jobs = parser.parse_args().jobs
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    flags = ["--jobs", str(jobs)] if jobs else []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "project"
        shutil.copytree(ROOT / "recipes", root / "recipes")
        shutil.copyfile(ROOT / "forge.toml", root / "forge.toml")
        subprocess.run([sys.executable, "-c", "import torch, diffusers, peft"], check=True)  # byte code, page cache
        say("from nothing", *build(root, *flags))
        time.sleep(2.5)
        build(root)
        say("nothing to do", *build(root))
        recipe = root / "recipes" / "anime-preset.toml"
        text = recipe.read_text()
        recipe.write_text(text.replace("rank = 8", "rank = 16"))
        say("rank 8 → 16", *build(root, *flags))
        recipe.write_text(text)
        say("back to 8", *build(root, *flags))


if __name__ == "__main__":
    main()
