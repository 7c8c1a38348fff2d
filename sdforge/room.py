"""How much of the disk a plan will take, and whether there is as much."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from math import prod

import sdforge.report.words as words
from sdforge.artifact import Artifact, Tensor
from sdforge.dtypes import ITEM_SIZE
from sdforge.errors import ResourceError, UsageError
from sdforge.families import family
from sdforge.file_layout import pays
from sdforge.method import method
from sdforge.plan import Plan, Step
from sdforge.session import Session


def room(session: Session, plan: Plan) -> tuple[int, int]:
    """Return the bytes that a plan will write, and those that are free."""
    folder = session.store.root if session.store.root.exists() else session.project.root
    return sum(bytes_needed(session, step) for step in plan.to_do), shutil.disk_usage(folder).free


def refuse_lack(session: Session, plan: Plan) -> None:
    """Refuse what the disk has no room for. Raises ResourceError."""
    needed, free = room(session, plan)
    if needed > free:
        raise ResourceError(
            f"the build needs about {words.size(needed)}, and {words.size(free)} are free",
            hint="`forge clean --dry-run` shows what could go; FORGE_CACHE names another place",
        )


def bytes_needed(session: Session, step: Step) -> int:
    """Estimate how many bytes a step writes."""
    if any(artifact is None for _, artifact in step.inputs):
        return 0
    if step.kind == "formula":
        try:
            return session.one_pass(step).size()
        except UsageError:
            return 0
    makes, checkpoint = step.node.target.signature.makes, step.inputs[0][1]
    states = _states_needed(session, step)
    if makes == "checkpoint" and checkpoint:
        return size_of(session, checkpoint) + states  # at most: what is not trained passes
    if makes == "files" and checkpoint:
        forms = {"checkpoint", "diffusers"} & set(json.loads(step.node.target.settings)["forms"])
        once = _written_once(session, step, checkpoint) if "checkpoint" in forms else 0
        return len(forms) * size_of(session, checkpoint) - once
    return states


def _written_once(session: Session, export: Step, checkpoint: Artifact) -> int:
    """Return which bytes of a single file are those that a formula writes for it (see `orders._file_layout`)."""
    steps = session.planner().steps
    planned = [name for name, component in checkpoint.components.items() if component.table.startswith("plan:")]
    maker = steps.get(export.inputs[0][0].id)
    makers = {maker.makers[name] for name in planned} if maker else set()
    if len(makers) != 1:
        return 0
    made = bytes_needed(session, steps[makers.pop()])
    return made if pays(made, size_of(session, checkpoint)) else 0


def _states_needed(session: Session, step: Step) -> int:
    """Estimate the bytes of a training's states: those that are kept, and one that is written beside them."""
    from sdforge.run.states import KEPT

    return (KEPT + 1) * state_size(session, step)


def state_size(session: Session, step: Step) -> int:
    """Estimate the bytes of one state of a training; 0 of what is none, or keeps none."""
    checkpoint = next((artifact for link, artifact in step.inputs if link.use.role == "on"), None)
    if checkpoint is None:
        return 0
    settings = method(step.node.target.signature.name).table.model_validate(step.node.target.raw)
    measure = getattr(settings, "state_bytes", None)
    if measure is None:
        return 0
    of = family(step.node.recipe.family)
    shapes = {name: {t.name: t.shape for t in tensors} for name, tensors in _tables(session, checkpoint).items()}
    if not shapes.keys() >= {"unet", *of.text_encoders}:
        return 0
    return int(measure(of, shapes))


def size_of(session: Session, artifact: Artifact) -> int:
    """Return the bytes of an artifact's tensors, also of those that are still to be made."""
    tensors = (tensor for table in _tables(session, artifact).values() for tensor in table)
    return sum(prod(tensor.shape) * ITEM_SIZE[tensor.dtype] for tensor in tensors)


def numbers_of(session: Session, artifact: Artifact) -> int:
    """Return how many numbers an artifact's tensors have, also those that are still to be made."""
    return sum(prod(tensor.shape) for table in _tables(session, artifact).values() for tensor in table)


def _tables(session: Session, artifact: Artifact) -> dict[str, list[Tensor]]:
    """Return the tensors of an artifact's networks, as far as they are known."""
    found = {}
    for name, component in artifact.components.items():
        if component.dtype:
            with suppress(UsageError):
                found[name] = session.planner().tensors(component)
    return found
