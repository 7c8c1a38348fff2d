"""What an action asks for where it runs as a job of a cluster: what follows from the action, unless `[cluster]` says.

Like all of how to run, it decides no result and enters no key.
"""

from __future__ import annotations

from math import ceil, prod
from typing import Any

from sdforge.errors import Place, Problem, RecipeError, UsageError, nearest
from sdforge.executors import Resources
from sdforge.method import method
from sdforge.order import Computation, Order
from sdforge.places import FILE, LOCAL, amount
from sdforge.plan import Plan, Step
from sdforge.project import Project, read_small
from sdforge.room import numbers_of, size_of, state_size
from sdforge.selection import LARGE
from sdforge.session import Session
from sdforge.syntax import read_toml

ON_DEVICE = ("trainings", "pictures", "checks")  # the kinds of action that compute on a device
MINUTES = 1440
CPUS = 4  # beside a GPU: one feeds it, others read pictures, keep states and import what is not loaded yet
FORMULA_CPUS = 3  # two that compute, one that hashes
GIB = 2**30
# benchmarks/RESULTS.md has what was measured of these
PROCESS = 2 * GIB  # python with its libraries, and what pictures and texts take
NETWORK = 6  # bytes for each number of the networks: fp32, and a copy in 16 bits
STATE = 1.5  # of what a training learns: with its optimiser's memory, and gradients or a copy that is being written
# elements to be chosen from: a processor takes 4 s for them (`ties`); for fewer no device is kept from others
WORTH_A_DEVICE = 1 << 27


def kind_of(step: Step) -> str:
    """Return the kind of job that a step can be: a table of `[cluster]`; "" where it only runs within a build."""
    signature = step.node.target.signature
    if signature.kind == "formula":
        return "formulas"
    if signature.group == "trainings":
        return "trainings"
    if signature.makes == "pictures":
        return "pictures"
    module = method(signature.name).module
    if signature.makes == "verdict":
        return "" if getattr(module, "INLINE", False) or getattr(module, "BARE", False) else "checks"
    return "edits" if signature.kind == "content" and signature.makes != "files" else ""


def is_job(session: Session, step: Step) -> bool:
    """Say whether a step runs as a job where there is a cluster: formulas only when told to, being short."""
    kind = kind_of(step)
    return bool(kind) and not _stated(session.project.cluster, step, kind).get("here", kind == "formulas")


def resources(session: Session, step: Step, device: str, threads: int) -> Resources:
    """Return what a step asks for as a job.

    device: the one that is wished for, as `[run]` has it; threads: CPU threads of a training.
    """
    kind = kind_of(step)
    stated = _stated(session.project.cluster, step, kind)
    gpus = stated.get("gpus", int(kind in ON_DEVICE and device != "cpu"))
    cpus = FORMULA_CPUS if kind == "formulas" else max(CPUS if gpus else 1, threads)
    memory = amount(stated["memory"]) if "memory" in stated else memory_of(session, step)
    return Resources(
        gpus, stated.get("cpus", cpus), memory, stated.get("minutes", MINUTES), stated.get("partition", "")
    )


def selects(order: Order) -> bool:
    """Say whether a formula chooses or ranks so many numbers that a device pays (see `sdforge.selection`)."""
    return sum(prod(c.shape) for c in order.compute if prod(c.shape) > LARGE and _selects(c)) >= WORTH_A_DEVICE


def _selects(computation: Computation) -> bool:
    inner = [each for each in computation.inputs if isinstance(each, Computation)]
    return getattr(method(computation.method).module, "SELECTS", False) or any(map(_selects, inner))


def _stated(cluster: dict[str, Any], step: Step, kind: str) -> dict[str, Any]:
    """Return what `[cluster]` states of a step: of all, its kind, its method, its target, its variant's target."""
    target, recipe = step.node.target, step.node.recipe
    of_all = {key: value for key, value in cluster.items() if not isinstance(value, dict)}
    if kind not in ON_DEVICE:
        of_all.pop("gpus", None)
    named = cluster.get("targets", {})
    found: dict[str, Any] = {}
    for level in (
        of_all,
        cluster.get(kind, {}),
        cluster.get("methods", {}).get(target.signature.name, {}),
        named.get(f"{recipe.home}:{target.name}", {}),
        named.get(step.id, {}),
    ):
        found |= {key: value for key, value in level.items() if value is not None}
    return found


def memory_of(session: Session, step: Step) -> int:
    """Estimate how much of a machine's memory a step needs, in bytes: whole GiB, rather too many.

    What a training's steps keep for their gradients is not in it: on a GPU it lies there, and on the CPU it depends on
    batch and resolution.
    """
    kind = kind_of(step)
    needed: float = PROCESS
    inputs = [artifact for _, artifact in step.inputs if artifact is not None]
    if kind == "edits":
        needed += sum(size_of(session, artifact) for artifact in inputs)
    elif kind in ON_DEVICE:
        needed += NETWORK * sum(numbers_of(session, artifact) for artifact in inputs)
        needed += STATE * state_size(session, step)
    return ceil(needed / GIB) * GIB


def asked_there(session: Session, plan: Plan, on: str, device: str | None) -> dict[str, Resources]:
    """Return the id of each step of a plan that would be a job of a cluster → what it would ask for.

    on: the cluster; device: the command line's, which goes before that of `[run]`. Raises UsageError for what is no
    cluster, RecipeError for strange targets.
    """
    from sdforge.executors.cluster import engine

    engine(on)
    refuse_strange_targets(session.project)
    run = session.project.run
    device, threads = device or run.get("device", "auto"), run.get("threads", 1)
    jobs = [step for step in plan.to_do if step.state != "fetch" and is_job(session, step)]
    return {step.id: resources(session, step, device, threads) for step in jobs}


def refuse_strange_targets(project: Project) -> None:
    """Refuse targets that `[cluster]` names and no recipe has. Raises RecipeError."""
    if problems := strange_targets(project):
        raise RecipeError(problems)


def strange_targets(project: Project) -> list[Problem]:
    """Return a problem for each target that `[cluster]` names and no recipe has."""
    found = []
    for name in project.cluster.get("targets", {}):
        recipe, _, target = name.rpartition(":")
        try:
            known = [f"{recipe}:{each}" for each in project.recipe(recipe).targets]
        except UsageError:
            known = [f"{each}:{target}" for each in project.recipe_names()]
        except RecipeError:  # which has mistakes to be told of first
            continue
        if name not in known:
            guess = nearest(name, known)
            hint = f'did you mean "{guess}"?' if guess else f"there are: {', '.join(known) or 'none'}"
            found.append(Problem("name", f"`{name}` is no target of this project", _place_of(project, name), hint))
    return found


def _place_of(project: Project, name: str) -> Place:
    """Return where `[cluster]` names a target: in forge.local.toml, or else in forge.toml."""
    files = [file for file in (LOCAL, FILE) if (project.root / file).exists()]
    documents = [read_toml(read_small(project.root / file, ""), file) for file in files]
    (stating, *_) = (each for each in documents if name in each.values.get("cluster", {}).get("targets", {}))
    return stating.place("cluster", "targets", name)
