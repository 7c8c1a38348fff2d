"""The plan as a table: one row per target, in the order in which they are made."""

from __future__ import annotations

import json
import sys

from sdforge.plan import Plan, Step
from sdforge.report.progress import NAMES, names, shown_digest, width_of
from sdforge.report.words import glyphs, hung, screen_width

MOST_ROWS = 60
IDLE = "nothing is computed"  # of a swap, and of an edit that changes nothing here


def nothing_to_do(plan: Plan) -> list[str]:
    """Return the lines that say that everything is reused."""
    steps = [step for step in plan.steps.values() if step.listed]
    called = names(plan)
    width = width_of(called[step.id] for step in steps)
    rows = [row(step, called[step.id], remark(step), width=width) for step in steps]
    rows = rows if len(steps) <= MOST_ROWS else []
    recipes = sorted({step.node.recipe.name for step in steps if step.id in plan.wanted})
    rows.append(f"{', '.join(recipes[:5])}{', …' if len(recipes) > 5 else ''}: everything is reused, nothing to do")
    return rows


def nothing_as_json(plan: Plan) -> None:
    """Print the same for programs."""
    steps = [step for step in plan.steps.values() if step.listed]
    for step in steps:
        event = {
            "v": 1,
            "event": "action",
            "target": step.id,
            "method": step.node.target.signature.name,
            "key": step.content_key or step.key,
            "state": step.state,
            "reason": [],
        }
        print(json.dumps(event))
    reused = sum(step.state == "reuse" for step in steps)
    counts = {"fetched": 0, "built": 0, "restored": 0, "reused": reused, "failed": 0, "skipped": 0}
    print(json.dumps({"v": 1, "event": "result", **counts}))


def remark(step: Step) -> str:
    """Return what stands behind a step that need not run: why it may not, or that there is nothing to run."""
    return step.reason if step.barred else IDLE if step.idle else ""


def row(step: Step, name: str, text: str = "", *, width: int = NAMES) -> str:
    """Return one line of a plan, or more where a terminal is too narrow for it; width: of the column of names."""
    sign = glyphs()["failed" if step.failed else step.state if step.state in glyphs() else "build"]
    state = "failed" if step.failed else "restore" if step.restore else step.state
    if step.differs:
        text = "differs from the pin" + (f"; {text}" if text else "")
    key = (shown_digest(step, step.result) or step.key)[:8]
    head = f"  {sign} {name:<{width}} {step.node.target.signature.name:<18} {state:<9} {key:<9}"
    return hung(head, text, screen_width(sys.stdout))
