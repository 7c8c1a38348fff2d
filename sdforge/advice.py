"""What methods, data sets and licences have to say of a plan before it runs: mistakes, and what may be one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import starmap
from typing import Any, NamedTuple

from sdforge.artifact import Artifact, made_artifact
from sdforge.errors import GET_AGAIN, Problem, RecipeError, SettingErrors
from sdforge.families import family
from sdforge.graph import Link, problem_at
from sdforge.identity import decimal
from sdforge.licences import conflicts
from sdforge.method import idle_patterns, method
from sdforge.picture_advice import advise_pictures, advise_prompts
from sdforge.plan import Plan, Step
from sdforge.session import Session

SHOWN = 3  # tensors that are named; of more, how many there are
IN_FRONT = "that one wins which has the longest text before its first wildcard"  # of two patterns


class Said(NamedTuple):
    """What is said of a step.

    role: `ROLE`, or `ROLE.NAME` of one of its inputs; "" is the data set; or a setting that it is about.
    """

    role: str
    code: str
    message: str
    hint: str
    warning: bool


def advice(session: Session, plan: Plan, steps: Iterable[Step] | None = None) -> list[Problem]:
    """Return what methods and data sets have to say of their inputs: mistakes, and what may be one.

    steps: of the plan, that are asked; default: all.
    """
    found: list[Problem] = []
    told: set[tuple[str, str]] = set()  # the doubts about each source that have been said
    for step in plan.steps.values() if steps is None else steps:
        if any(artifact is None and link.id in session.graph.sources for link, artifact in step.inputs):
            continue
        said = list(_of_method(session, plan, step))
        if step.node.target.signature.makes == "files":
            said += [*_other_unet(plan, step), *_read_otherwise(plan, step)]
            found += _licence_problems(session, plan, step)
        if text := weights_off(step, step.node.target.name):
            said.append(Said("weights", "weights", text, "0.6 and 0.4 are 60 % and 40 %", True))
        said += [Said(role, "pattern", text, IN_FRONT, True) for role, text in unheeded(step)]
        for link, code, words in doubts(plan, step):
            if (code, link.id) not in told:
                said.append(_doubt(link, code, words))
            told.add((code, link.id))
        found += [_placed(session, step, each) for each in said]
    return found


def _of_method(session: Session, plan: Plan, step: Step) -> Iterator[Said]:
    """Yield what a step's method says of its settings and inputs, and what all trainings say."""
    import sdforge.trainings as trainings  # loads pydantic, which a plan with nothing to do does without

    inputs: dict[str, list[Artifact | None]] = {}
    for link, artifact in step.inputs:
        inputs.setdefault(link.use.role, []).append(artifact or _foretold(plan.steps[link.id]))
    signature = step.node.target.signature
    found = method(signature.name)
    table = found.table.model_validate(step.node.target.raw)
    if advise := getattr(found.module, "advise", None):
        yield from starmap(Said, advise(table, inputs))
    captions = getattr(found.module, "CAPTIONS", True)
    if signature.group == "trainings":
        yield from starmap(Said, trainings.advise(table, inputs, captions=captions))
    yield from starmap(Said, _words(session, found.module, table, inputs))
    yield from (Said(name, *each) for name, each in advise_prompts(table))
    uncaptioned = getattr(found.module, "UNCAPTIONED", ())
    for link, artifact in step.inputs:
        if artifact is not None and artifact.kind == "dataset":
            role, name = link.use.role, link.use.reference
            read = captions and role not in uncaptioned
            for each in advise_pictures(name, artifact, inputs, table, captions=read):
                yield Said(f"{role}.{name}", *each)


def _placed(session: Session, step: Step, said: Said) -> Problem:
    name, _, reference = (said.role or "dataset").partition(".")
    uses = [link.use for link, _ in step.inputs if link.use.role == name]
    use = next((use for use in uses if reference in ("", use.reference)), None)
    target = step.node.target
    place = (session.project, step.node.recipe, target, use, said.code, said.message, said.hint)
    return problem_at(*place, key="" if uses else name, warning=said.warning)


def weights_off(step: Step, name: str) -> str:
    """Say that a weighted sum has weights that do not sum to 1; other merges' weights are no shares, or made so."""
    if step.node.target.signature.name != "weighted_sum":
        return ""
    total = sum(map(decimal, json.loads(step.node.target.settings)["weights"]))
    said = f"{float(total):g}"
    return f"the weights of {name} sum to {said if said != '1' else total}, not to 1" if total != 1 else ""


def unheeded(step: Step) -> Iterator[tuple[str, str]]:
    """Yield which patterns of blocks decide nothing, since others go before them: the role as in `Said`, a sentence."""
    tables = {"": step.node.target.raw} | {
        f"{link.use.role}.{link.use.reference}": link.use.use or {} for link, _ in step.inputs
    }
    stated = {role or "blocks": table["blocks"] for role, table in tables.items() if table.get("blocks")}
    for role, patterns in stated.items():
        with suppress(SettingErrors):  # mistakes of what waits for its inputs are said when these are there
            for pattern in idle_patterns(patterns, family(step.node.recipe.family)):
                yield role, f"the block pattern {pattern!r} decides nothing: others go before it"


def refuse_mistakes(session: Session, plan: Plan) -> None:
    """Refuse to run what methods say cannot work, before anything runs. Raises RecipeError."""
    mistakes = [problem for problem in advice(session, plan) if not problem.warning]
    if mistakes:
        raise RecipeError(mistakes)


def warnings(session: Session, plan: Plan) -> list[Problem]:
    """Return what may be a mistake of what is trained now, and of files that are written now, each sentence once.

    Of a training only hours would show it; a file with NaN shows it where it is drawn with.
    """
    trained = [each for each in plan.steps.values() if each.state == "build" and each.kind == "content"]
    found: dict[str, Problem] = {}
    for problem in [*advice(session, plan, trained), *_broken(session, plan)]:
        if problem.warning:
            found.setdefault(problem.message, problem)
    return list(found.values())


def note_warnings(session: Session, plan: Plan, note: Callable[[str], None]) -> None:
    """Tell whoever builds what may be a mistake, each with its place."""
    for warning in warnings(session, plan):
        note(f"{warning.place}: {warning.message}")


def _broken(session: Session, plan: Plan) -> Iterator[Problem]:
    """Yield which sources of what is written or drawn now hold NaN or Inf, also where all steps between are reused."""
    ends = [step.id for step in plan.to_do if step.node.target.signature.makes in ("files", "pictures")]
    for step in [plan.steps[node.id] for node in session.graph.behind(ends)]:
        for link, code, words in doubts(plan, step):
            if code == "broken":
                yield _placed(session, step, _doubt(link, code, words))


def licences(session: Session, plan: Plan, end: str) -> dict[str, str]:
    """Return source → licence of all that a target is made from, as stated or as the file says."""
    steps = (plan.steps[node.id] for node in session.graph.behind([end]) if node.id in plan.steps)
    taken = {link.id: artifact for step in steps for link, artifact in step.inputs if link.id in session.graph.sources}
    stated = {name: session.graph.sources[name].table.get("licence", "") for name in taken}
    noted = {name: artifact.notes.get("licence", "") for name, artifact in taken.items() if artifact is not None}
    return {name: licence for name in taken if (licence := str(stated[name] or noted.get(name, "")))}


def against_licence(session: Session, plan: Plan, export: Step) -> list[str]:
    """Say, input by input, where a preset's own licence does not keep what an input's asks for."""
    return list(conflicts(str(export.node.target.raw["licence"]), licences(session, plan, export.id)))


def _licence_problems(session: Session, plan: Plan, export: Step) -> Iterator[Problem]:
    hint = "another licence for the preset, or another input; forge only knows what licences commonly say"
    for reason in against_licence(session, plan, export):
        place = (session.project, export.node.recipe, export.node.target, None, "licence", reason, hint)
        yield problem_at(*place, key="licence", warning=True)


def _words(session: Session, module: Any, table: Any, inputs: dict[str, list[Artifact | None]]) -> list[Any]:
    """Return what a method has to say of new words, once it is known which ones the checkpoint has."""
    advise_words = getattr(module, "advise_words", None)
    on = next(iter(inputs.get("on") or inputs.get("checkpoint", [])), None)
    component = on.components.get("tokenizer") if on is not None else None
    return list(advise_words(table, inputs, session.vocabulary(component))) if advise_words and component else []


def _foretold(step: Step) -> Artifact | None:
    """Return what is known of something that is not made yet, where its method's settings decide its facts."""
    signature = step.node.target.signature
    found = method(signature.name)
    tell = getattr(found.module, "facts", None)
    if tell is None:
        return None
    return made_artifact(signature.makes, "", {}, tell(found.table.model_validate(step.node.target.raw)))


def _other_unet(plan: Plan, step: Step) -> Iterator[Said]:
    """Say which null-text inversions were made with another U-Net than the one that will draw them."""
    checkpoint = next(link.id for link, _ in step.inputs if link.use.role == "checkpoint")
    for link, _ in step.inputs:
        maker = plan.steps.get(link.id)
        if link.use.role != "sidecars" or maker is None or maker.node.target.signature.makes != "null_text":
            continue
        on = next(found for found, _ in maker.inputs if found.use.role == "on")
        if _unet_of(plan, on.id) != _unet_of(plan, checkpoint):
            name = link.use.reference
            text = f"`{name}` was inverted with another U-Net than the preset has, and comes out less like its picture"
            hint = f'on = "{step.node.recipe.preset["checkpoint"] if step.node.recipe.preset else ""}", or no baking'
            yield Said(f"sidecars.{name}", "base", text, hint, True)


def _read_otherwise(plan: Plan, step: Step) -> Iterator[Said]:
    """Say of exported LoRAs which ones other programs read otherwise than they were learned (`docs/programs.md`)."""
    written = "loras" in json.loads(step.node.target.settings)["forms"]
    for link, _ in step.inputs if written else ():
        maker = plan.steps.get(link.id)
        if link.use.role == "loras" and maker is not None and maker.node.target.raw.get("dora"):
            name = link.use.reference
            programs = "ComfyUI, A1111 and InvokeAI"
            text = f"`{name}` has `dora = true`: {programs} draw otherwise with its file than it was learned"
            hint = "bake it, or leave out `dora`; diffusers reads `loras-diffusers` as it is meant (docs/programs.md)"
            yield Said(f"loras.{name}", "dora", text, hint, True)


def _unet_of(plan: Plan, identifier: str) -> str:
    """Return the target or source from which a checkpoint has its U-Net; another type of numbers is no other one."""
    while (step := plan.steps.get(identifier)) is not None:
        method_name, roles = step.node.target.signature.name, {link.use.role for link, _ in step.inputs}
        passes = method_name in ("insert", "cast") or (method_name == "swap" and "unet" not in roles)
        if not passes and roles != {"checkpoint", "aesthetics"}:
            break
        identifier = next(link.id for link, _ in step.inputs if link.use.role == "checkpoint")
    return identifier


def doubts(plan: Plan, step: Step) -> Iterator[tuple[Link, str, tuple[str, str]]]:
    """Yield which sources of a step are to be doubted, and why: a sentence, and a way out.

    `unsaid`: what is assumed of a checkpoint as nothing says it; `broken`: tensors with NaN or Inf, at which whoever
    computes stops, and which reach a preset's file where they pass; `lacking`: a merge makes what its first checkpoint
    has, and the networks that it lacks are left out of the others too.
    """
    yield from _lacking(step)
    for link, artifact in step.inputs:
        notes = artifact.notes if artifact is not None and link.id not in plan.steps else {}
        if "unsaid" in notes:
            hint = 'state `prediction` beside its `from`: "v_prediction" (768-v and its like), or "epsilon" if it is so'
            yield link, "unsaid", (f"`{link.use.reference}`: {notes['unsaid']}", hint)
        if names := notes.get("broken"):
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            sentence = f"`{link.use.reference}` holds NaN or Inf in {', '.join(names[:SHOWN])}{more}"
            yield link, "broken", (sentence, GET_AGAIN)


def _doubt(link: Link, code: str, words: tuple[str, str]) -> Said:
    return Said(f"{link.use.role}.{link.use.reference}", code, *words, warning=True)


def _lacking(step: Step) -> Iterator[tuple[Link, str, tuple[str, str]]]:
    if step.node.target.signature.group != "merges":
        return
    (first, base), *others = step.inputs
    if base is None or base.kind != "checkpoint":
        return
    for link, other in others:
        there = () if other is None else other.components.keys() - base.components.keys()
        if missing := [name for name in family(step.node.recipe.family).networks if name in there]:
            one, more, made = first.use.reference, link.use.reference, step.node.target.name
            text = f"`{one}` has no {' and no '.join(missing)}: of `{more}` that is left out of `{made}`"
            yield link, "lacking", (text, f"put `{more}` first, or take that with [swap.NAME]")
