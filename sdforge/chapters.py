"""From a plan that has been built to what is remembered of it: see `chronicle`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from sdforge.chronicle import Chapter, Did, Past
from sdforge.drawn import pictures_in
from sdforge.explain import Explainer, in_short
from sdforge.hidden import hidden
from sdforge.plan import Plan, Step
from sdforge.project import read_small
from sdforge.report.progress import shown_digest
from sdforge.session import Session
from sdforge.target import EXPORT, PREVIEWS


def presets(plan: Plan) -> list[str]:
    """Return the recipes whose preset a plan makes, and of which nothing is left to do."""
    ends = {name: f"{name}:{EXPORT}" for name in _recipes(plan)}
    return [name for name, end in ends.items() if end in plan.wanted and all(_is_done(s) for s in _ends(plan, name))]


def _recipes(plan: Plan) -> list[str]:
    return list(dict.fromkeys(step.node.recipe.name for step in plan.steps.values()))


def _ends(plan: Plan, recipe: str) -> list[Step]:
    found = (plan.steps.get(f"{recipe}:{name}") for name in (EXPORT, PREVIEWS))
    return [step for step in found if step is not None]


def _is_done(step: Step) -> bool:
    return step.result is not None and not step.to_do and all(check.passed for check in step.checks)


def behind(session: Session, plan: Plan, recipe: str) -> list[Step]:
    """Return the steps of a plan from which a preset is made, inputs first, itself last."""
    return _behind(session, plan, [step.id for step in _ends(plan, recipe)])


def _behind(session: Session, plan: Plan, ends: list[str]) -> list[Step]:
    return [plan.steps[node.id] for node in session.graph.behind(ends) if node.id in plan.steps]


def reasons(session: Session, plan: Plan) -> dict[str, str]:
    """Return why what has to be done has to be done: id → reason. Asked before a build, which makes the reasons go."""
    explainer = Explainer(session, plan)
    return {step.id: in_short(explainer.causes(step)) for step in plan.to_do}


def remember(session: Session, plan: Plan, done: Mapping[str, Iterable[str]], why: dict[str, str]) -> None:
    """Remember a build that is over, of every recipe that it took.

    done: `built`, `fetched`, `restored` → ids; why: what `reasons` said before it.
    """
    states = {identifier: state for state, identifiers in done.items() for identifier in identifiers}
    _keep_manifests(session, plan)
    finished = presets(plan)

    def entered(past: Past, recipe: str) -> Past:
        past = past.with_keys(dict(_keys(session, plan, recipe)))
        if recipe in finished:
            past = past.with_build(chapter(session, plan, recipe, states, why))
        drawn = plan.steps.get(f"{recipe}:{PREVIEWS}")
        if drawn is not None and drawn.artifact is not None and drawn.state == "reuse" and not drawn.restore:
            past = past.with_passed(pictures_in(drawn.artifact), unchecked=drawn.unchecked)
        return past

    for recipe in _recipes(plan):
        session.chronicle.change(recipe, partial(entered, recipe=recipe))


def _keys(session: Session, plan: Plan, recipe: str) -> Iterator[tuple[str, str]]:
    """Yield (id, plan key) of what there is now of a recipe, and of all behind what is wanted of it."""
    own = [step for step in plan.steps.values() if step.node.recipe.name == recipe]
    wanted = [step.id for step in own if step.id in plan.wanted]
    for step in (*own, *_behind(session, plan, wanted)):
        if step.key and not step.to_do:
            yield step.id, step.key


def _keep_manifests(session: Session, plan: Plan) -> None:
    """Keep the manifests of what is there now and was made differently before, or never: `why` compares with them."""
    for step in plan.steps.values():
        if not step.key or step.to_do or session.chronicle.last_key(step.id) == step.key:
            continue
        session.store.note_preimage(step.key, step.manifest)
        for _, artifact in step.inputs:
            if artifact is not None and "rows" in artifact.notes:
                named = {"rows": artifact.notes["rows"], "names": artifact.notes["names"]}
                session.store.note_whole(artifact.whole, named)


def chapter(session: Session, plan: Plan, recipe: str, states: dict[str, str], why: dict[str, str]) -> Chapter:
    """Return a preset as the plan has it, as a build of it. states: id → what was done, for what was not reused."""
    steps = {
        step.id: Did(
            step.content_key or step.key,
            shown_digest(step, step.result),
            states.get(step.id, "reused"),
            why.get(step.id, "") if step.id in states else "",
        )
        for step in behind(session, plan, recipe)
        if not step.passes
    }
    file = plan.steps[f"{recipe}:{EXPORT}"].node.recipe.file
    text = hidden(read_small(session.project.root / file, "").decode(errors="replace"))  # reports show it
    drawn = plan.steps.get(f"{recipe}:{PREVIEWS}")
    pictures = pictures_in(drawn.artifact) if drawn is not None and drawn.artifact is not None else None
    return Chapter(time.time(), text, steps, pictures)
