"""What a plan will cost: time from what similar actions took before, and disk."""

from __future__ import annotations

import json
import sys

from sdforge.orders import state_folder
from sdforge.plan import Plan, Step
from sdforge.run.states import newest
from sdforge.session import Session


def estimate(session: Session, step: Step) -> float | None:
    """Return the seconds a step will take, from the last time its method ran here; None if it never did."""
    pace = session.store.run_noted(f"{step.node.target.signature.name}:{step.node.recipe.family}")
    if not pace:
        return None
    fixed, each = pace
    settings = json.loads(step.node.target.settings)
    if step.node.target.signature.makes == "pictures":
        units = (
            len(settings["prompts"])
            * len(settings["seeds"])
            * (1 + sum(link.use.role == "beside" for link, _ in step.inputs))
        )
    elif step.node.target.signature.makes == "dataset":
        units = settings["count"]
    else:
        units = max(0, settings.get("steps", 1) - begun(session, step))
    return float(fixed + each * units)


def begun(session: Session, step: Step) -> int:
    """Return after how many steps a training will go on from a state that was kept; 0: it begins, or is none."""
    manifest = step.content_manifest or step.manifest
    if step.node.target.signature.group != "trainings" or step.state != "build" or not manifest:
        return 0
    most = json.loads(step.node.target.settings).get("steps", sys.maxsize)
    return newest(state_folder(session, step, manifest), most)


def total(session: Session, plan: Plan) -> tuple[float, bool]:
    """Return (seconds of all that is known, whether everything is)."""
    found = [estimate(session, step) for step in plan.to_do if not step.restore]
    return sum(value for value in found if value is not None), None not in found
