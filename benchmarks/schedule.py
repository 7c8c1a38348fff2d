"""A thousand presets on a hundred GPUs, simulated: `python -m benchmarks.schedule`.

Real recipes are read, linked and planned; then time is simulated: whenever a GPU is free, it takes the first action of
the plan that can start, as `sdforge.build` does, and a twin of an action under another name waits for it. Merges, bakes
and exports need no GPU and run at once. Durations are drawn once per action from a fixed seed (a training: 10 to 60
minutes). The makespan is compared with what no schedule can beat: all work over all GPUs, and the longest chain.
"""

from __future__ import annotations

import argparse
import heapq
import random
import tempfile
import time
from pathlib import Path

from sdforge.plan import Plan, Step
from sdforge.session import open_session
from tests.toys import write_checkpoint, write_drawings

MINUTES = {"lora": (10, 60), "textual_inversion": (10, 40), "previews": (1, 3)}
BASES = 20  # merges that the presets share; 10 presets share a style


def write_project(root: Path, presets: int) -> None:
    """Write one recipe per preset: a shared merge, a word of its own, a style that ten of them share."""
    (root / "recipes").mkdir(parents=True)
    write_checkpoint(root / "flat")
    write_checkpoint(root / "ink", seed=1)
    for i in range(max(presets // 10, 1)):
        write_drawings(root / f"style{i}")
        first = sorted((root / f"style{i}").glob("*.txt"))[0]
        first.write_text(f"style {i}")
    data = "".join(f'[dataset.style{i}]\npath = "style{i}"\ntrigger = "<toy>"\n' for i in range(max(presets // 10, 1)))
    sources = '[source.flat]\nfrom = "flat"\n[source.ink]\nfrom = "ink"\n'
    (root / "forge.toml").write_text(sources + data)
    for i in range(presets):
        weight = (i % BASES + 1) / (BASES + 1)
        style = i // 10
        (root / "recipes" / f"p{i}.toml").write_text(
            f'family = "sd15"\n[weighted_sum.soft]\ncheckpoints = ["flat", "ink"]\nweights = [{weight}, {1 - weight}]\n'
            f'[lora.style]\non = "flat"\ndataset = "style{style}"\nsteps = 100\n'
            f'[textual_inversion.word]\non = "soft"\ndataset = "style{style}"\ntoken = "<w{i}>"\ninit = "cat"\n'
            f"seed = {i}\nsteps = 100\n"
            '[preset]\ncheckpoint = "soft"\ninsert = ["word"]\nbake = { style = 0.8 }\n'
        )


def simulate(plan: Plan, gpus: int) -> tuple[float, float, float, int, int]:
    """Return makespan, work and longest chain in minutes, actions that were run on GPUs, and twins that waited."""
    draw = random.Random(0)
    minutes = {
        name: draw.uniform(*MINUTES.get(step.node.target.signature.name, (0, 0))) for name, step in plan.steps.items()
    }
    first: dict[str, str] = {}
    for name, step in plan.steps.items():
        first.setdefault(_twin(step), name)
    needs = {name: {link.id for link in plan.steps[name].node.links if link.id in plan.steps} for name in plan.steps}
    for name, step in plan.steps.items():
        if first[_twin(step)] != name:
            needs[name], minutes[name] = {first[_twin(step)]}, 0.0
    users: dict[str, list[str]] = {name: [] for name in needs}
    for name, found in needs.items():
        for each in found:
            users[each].append(name)
    order = {name: i for i, name in enumerate(plan.steps)}
    waiting = {name: len(found) for name, found in needs.items()}
    ready = [(order[name], name) for name, count in waiting.items() if not count]
    heapq.heapify(ready)
    running: list[tuple[float, str]] = []
    free, now, ran = gpus, 0.0, 0
    chain: dict[str, float] = {}
    names = list(plan.steps)
    for name in names:  # inputs stand before what takes them
        chain[name] = minutes[name] + max((chain[each] for each in needs[name]), default=0.0)
    while ready or running:
        held = []
        while ready:
            place, name = heapq.heappop(ready)
            if not minutes[name]:
                _end(name, users, waiting, ready, order)
            elif free:
                free, ran = free - 1, ran + 1
                heapq.heappush(running, (now + minutes[name], name))
            else:
                held.append((place, name))
        ready = held
        heapq.heapify(ready)
        if running:
            now, name = heapq.heappop(running)
            free += 1
            _end(name, users, waiting, ready, order)
    assert not any(waiting.values()), "something never ran"
    return (
        now,
        sum(minutes.values()),
        max(chain.values()),
        ran,
        sum(first[_twin(s)] != n for n, s in plan.steps.items()),
    )


def _twin(step: Step) -> str:
    """Name what a step makes: its key, or where that is not known yet, itself."""
    return step.content_key or step.key or step.id


def _end(
    name: str, users: dict[str, list[str]], waiting: dict[str, int], ready: list[tuple[int, str]], order: dict[str, int]
) -> None:
    for user in users[name]:
        waiting[user] -= 1
        if not waiting[user]:
            heapq.heappush(ready, (order[user], user))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", type=int, default=1000)
    parser.add_argument("--gpus", type=int, default=100)
    wishes = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "project"
        write_project(root, wishes.presets)
        began = time.process_time()
        session = open_session(root)
        plan = session.plan(session.resolve(session.project.recipe_names()))
        spent = time.process_time() - began
        makespan, work, chain, ran, twins = simulate(plan, wishes.gpus)
    bound = max(work / wishes.gpus, chain)
    keys = {_twin(step) for step in plan.steps.values() if step.node.target.signature.name in MINUTES}
    assert ran == len(keys), f"{ran} actions ran for {len(keys)} keys"
    print(f"{wishes.presets} presets, {len(plan.steps)} targets, read and planned in {spent:.1f} s of CPU")
    print(f"{ran} actions on {wishes.gpus} GPUs, each key once; {twins} targets share another one's")
    print(
        f"makespan {makespan / 60:.2f} h; no schedule is shorter than {bound / 60:.2f} h: {makespan / bound:.3f} of it"
    )


if __name__ == "__main__":
    main()
