"""Which steps of a plan can run now."""

from __future__ import annotations

from collections.abc import Callable, Container

from sdforge.plan import Plan, Step
from sdforge.target import PREVIEWS


def is_ready(
    plan: Plan, step: Step, busy: Container[str], within: Callable[[Step], list[Step]], *, checked: bool
) -> bool:
    """Say whether all bytes that a step reads are there, and what it writes may be written.

    busy: ids of the steps that run; within: a step → the formulas that are computed in its pass; checked: whether
    checks decide what is written.
    """
    if step.state == "fetch":
        return True
    if checked and step.node.target.placed and _waits_for_checks(plan, step):
        return False
    if any(artifact is None for _, artifact in step.inputs):
        return False
    for link, artifact in step.inputs:
        other = plan.steps.get(link.id)
        if other is None or artifact is None:
            continue
        if other.state in ("build", "maybe", "fetch", "running"):
            return False
        reads = step.node.target.role(link.use.role).reads
        needed = [maker for name, maker in other.makers.items() if name.startswith(reads or ("\0",))]
        if any(maker in plan.steps and (plan.steps[maker].to_do or maker in busy) for maker in needed):
            return False
    return all(is_ready(plan, each, busy, within, checked=checked) for each in within(step))


def _waits_for_checks(plan: Plan, step: Step) -> bool:
    """Say whether a preset's files, or its drawn previews, must not be put into `out/` yet."""
    makes = step.node.target.signature.makes
    drawn = plan.steps.get(f"{step.node.recipe.name}:{PREVIEWS}")
    if makes == "files" and drawn is not None and drawn.state not in ("reuse", "unneeded"):
        return True  # a preset that cannot be drawn, or is black, is not written either
    return (makes == "files" or step.restore) and not all(check.passed for check in step.checks)
