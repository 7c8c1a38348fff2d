"""The last two builds of every preset: what was made in them and why, so that the next one can be compared.

It lies in the cache's index: if that is lost, so is what was before, and nothing else. A build that made the same as
the last one is the same build.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sdforge.explain import Explainer, in_short
from sdforge.looks import Pictures, own_column
from sdforge.plan import Plan, Step
from sdforge.project import read_small
from sdforge.report.progress import shown_digest
from sdforge.session import Session

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

EXPORT, PREVIEWS = "preset.export", "preset.previews"


@dataclass(frozen=True)
class Did:
    """What a build did about a target. state: `built`, `fetched`, `restored` or `reused`; why: the reason in short."""

    key: str
    digest: str
    state: str
    why: str = ""


@dataclass(frozen=True)
class Chapter:
    """One build of a preset.

    made: seconds since 1970; recipe: its text; steps: id → what was done about it; pictures: the previews, if it drew
    any.
    """

    made: float
    recipe: str
    steps: dict[str, Did] = field(default_factory=dict)
    pictures: Pictures | None = None

    def same_as(self, other: Chapter) -> bool:
        """Say whether both builds came out alike."""
        return self._results() == other._results()

    def _results(self) -> dict[str, tuple[str, str]]:
        return {identifier: (did.key, did.digest) for identifier, did in self.steps.items()}


def presets(plan: Plan) -> list[str]:
    """Return the recipes whose preset a plan makes, and of which nothing is left to do."""
    ends = {name: f"{name}:{EXPORT}" for name in dict.fromkeys(step.node.recipe.name for step in plan.steps.values())}
    return [name for name, end in ends.items() if end in plan.wanted and all(_is_done(s) for s in _ends(plan, name))]


def _ends(plan: Plan, recipe: str) -> list[Step]:
    found = (plan.steps.get(f"{recipe}:{name}") for name in (EXPORT, PREVIEWS))
    return [step for step in found if step is not None]


def _is_done(step: Step) -> bool:
    return step.result is not None and not step.to_do and all(check.passed for check in step.checks)


def behind(session: Session, plan: Plan, recipe: str) -> list[Step]:
    """Return the steps of a plan from which a preset is made, inputs first, itself last."""
    nodes = session.graph.behind([step.id for step in _ends(plan, recipe)])
    return [plan.steps[node.id] for node in nodes if node.id in plan.steps]


def reasons(session: Session, plan: Plan) -> dict[str, str]:
    """Return why what has to be done has to be done: id → reason. Asked before a build, which makes the reasons go."""
    explainer = Explainer(session, plan)
    return {step.id: in_short(explainer.causes(step)) for step in plan.to_do}


def enter(session: Session, plan: Plan, done: Mapping[str, Iterable[str]], why: dict[str, str]) -> None:
    """Enter a build of every preset in a plan that is done. done: `built`, `fetched`, `restored` → ids."""
    states = {identifier: state for state, identifiers in done.items() for identifier in identifiers}
    for name in presets(plan):
        now, before = chapter(session, plan, name, states, why), chapters(session, name)
        if not before or not now.same_as(before[0]):
            told = [asdict(each) for each in (now, *before[:1])]
            session.store.note_run(_row(session, name), told)


def chapter(session: Session, plan: Plan, recipe: str, states: dict[str, str], why: dict[str, str]) -> Chapter:
    """Return a preset as the plan has it, as a build of it."""
    steps = {
        step.id: Did(
            step.content_key or step.key,
            shown_digest(step, step.result),
            states.get(step.id, "reused"),
            why.get(step.id, "") if step.id in states else "",
        )
        for step in behind(session, plan, recipe)
        if not step.idle
    }
    file = plan.steps[f"{recipe}:{EXPORT}"].node.recipe.file
    text = read_small(session.project.root / file, "").decode(errors="replace")
    drawn = plan.steps.get(f"{recipe}:{PREVIEWS}")
    if drawn is None or drawn.result is None:
        return Chapter(time.time(), text, steps)
    return Chapter(time.time(), text, steps, Pictures(drawn.result.key, drawn.result.digest, own_column(drawn)))


def chapters(session: Session, recipe: str) -> list[Chapter]:
    """Return the last build of a preset and the one before it, as far as there were any."""
    rows: list[dict[str, Any]] = session.store.run_noted(_row(session, recipe)) or []
    return [_chapter(row) for row in rows]


def _chapter(row: dict[str, Any]) -> Chapter:
    steps = {identifier: Did(**did) for identifier, did in row["steps"].items()}
    return Chapter(row["made"], row["recipe"], steps, row["pictures"] and Pictures(*row["pictures"]))


def _row(session: Session, recipe: str) -> str:
    return f"builds:{session.project.root}:{recipe}"
