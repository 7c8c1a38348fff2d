"""Whether an action's inputs fit it and each other: kinds, families, widths, and words that are made twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from sdforge.errors import Problem, RecipeError
from sdforge.families import family
from sdforge.graph import Node, way_in, wrong_kind
from sdforge.plan import Step
from sdforge.target import PREVIEWS, Use

LOADED = ("unet", "text_encoder", "vae")  # what reads all of them loads a checkpoint as a whole, to draw or to train


class Misfit(NamedTuple):
    """A problem of a node, not yet with its place.

    use: the input that it is about; key: of the target's table; source: the source that cannot be used.
    """

    node: Node
    use: Use | None
    problem: Problem
    key: str = ""
    source: str = ""


class Misfits(RecipeError):
    """Inputs that do not fit, not yet with the places where they are named."""

    def __init__(self, found: list[Misfit]) -> None:
        super().__init__([misfit.problem for misfit in found])
        self.found = found


def misfits(step: Step, steps: Mapping[str, Step]) -> Iterator[Misfit]:
    """Yield what is wrong with the inputs of a step. steps: those that make them, by id."""
    return chain(_strangers(step, steps), _halves(step), _twins(step, steps))


def _strangers(step: Step, steps: Mapping[str, Step]) -> Iterator[Misfit]:
    """Yield inputs of a kind, a family or widths that do not fit."""
    widths: dict[str, tuple[Any, str]] = {}
    ours = family(step.node.recipe.family)
    for link, artifact in step.inputs:
        target, name = step.node.target, link.use.reference
        role = target.signature.roles[link.use.role]
        makes = artifact.kind if artifact else steps[link.id].node.target.signature.makes
        if makes not in role.kinds:
            hint = way_in(name, makes) if target.implicit else ""
            yield misfit(step, link.use, "kind", wrong_kind(name, makes, role), hint)
            continue
        if artifact is None:
            continue
        if not ours.takes(artifact.kind, artifact.family):
            theirs = family(artifact.family).title
            message = f"`{name}` is for {theirs}, and the recipe is for {ours.title}"
            hint = f'take one for {ours.title}, or family = "{artifact.family}" at the top of the recipe'
            yield misfit(step, link.use, "family", message, hint)
            continue  # its widths are another family's too
        for key, value in artifact.notes.get("widths", {}).items():
            other, whose = widths.setdefault(key, (value, name))
            if other != value:
                message = f"`{name}` does not fit `{whose}`: its {key} is {value} wide, the other's {other}"
                yield misfit(step, link.use, "family", message)


def _halves(step: Step) -> Iterator[Misfit]:
    """Yield checkpoints that would be drawn or trained with, and lack a network: loading them fails, later."""
    ours = family(step.node.recipe.family)
    for link, artifact in step.inputs if step.kind == "content" else ():
        role, name = step.node.target.signature.roles[link.use.role], link.use.reference
        if artifact is None or artifact.kind != "checkpoint" or not set(role.reads).issuperset(LOADED):
            continue
        if lost := [part for part in ours.networks if part not in artifact.components and part not in ours.spare]:
            message = f"`{name}` has no {' and no '.join(lost)}: nothing can be drawn or trained with it"
            hint = "take that from another checkpoint with [swap.NAME]"
            hint += ", or leave out [preset.previews]" if step.node.target.name == PREVIEWS else ""
            yield misfit(step, link.use, "component", message, hint)


def _twins(step: Step, steps: Mapping[str, Step]) -> Iterator[Misfit]:
    """Yield artifacts that make one word, also where they have not been trained yet."""
    words: dict[str, str] = {}
    for link, artifact in step.inputs:
        if step.node.target.signature.roles[link.use.role].kind not in ("embedding", "custom"):
            continue
        facts = artifact.facts if artifact is not None else steps[link.id].node.target.raw
        word, name = str(facts.get("token", "")), link.use.reference
        if word in words:
            message = f"`{name}` and `{words[word]}` are both called {word!r}"
            yield misfit(step, link.use, "token", message, "give one of them another token")
        elif word:
            words[word] = name


def misfit(step: Step, use: Use | None, code: str, message: str, hint: str = "", *, key: str = "") -> Misfit:
    """Return a problem of a step."""
    return Misfit(step.node, use, Problem(code, message, None, hint), key)
