"""The commands that do more than plan a build: kept apart, so that a null build does not import them."""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
from typing import Any

from sdforge.advice import (
    IN_FRONT,
    advice,
    against_licence,
    doubts,
    note_warnings,
    refuse_mistakes,
    unheeded,
    weights_off,
)
from sdforge.build import Build
from sdforge.errors import CheckFailed, Problem, RecipeError, ResourceError, UsageError, counted, exit_code
from sdforge.executors import Cluster, Resources
from sdforge.executors.local import LocalExecutor
from sdforge.explain import Cause, Explainer, in_short
from sdforge.grids import PICTURE, lacking
from sdforge.lock import Lock
from sdforge.lockfile import LockFile, distance
from sdforge.places import LOCAL, LOCK, VRAM, amount
from sdforge.plan import Plan, Step
from sdforge.report.blocks import block_table
from sdforge.report.cost import begun, estimate, total
from sdforge.report.progress import names, reporter, short, width_of
from sdforge.report.table import IDLE, remark, row
from sdforge.report.words import INSET, glyphs, say, seconds, size
from sdforge.resources import refuse_strange_targets, strange_targets
from sdforge.room import refuse_lack, room
from sdforge.session import Session
from sdforge.under_way import Options, Summary
from sdforge.variants import MARK

JOBS_ELSEWHERE = 16  # actions side by side where a cluster runs them
MOST_BEHIND = 50  # reasons one behind the other that are said
MOST_NAMED = 4  # results between which a digest does not decide


# -- build and plan ----------------------------------------------------------------------------------------------------


def build_for_real(session: Session, wanted: list[str], made: Plan, wishes: argparse.Namespace) -> int:
    """Run what must run; say what came of it; return the exit code. made: the plan of what is wanted."""
    gc.freeze()  # what was made for the plan stays to the end, and is not looked through
    gc.enable()
    run = session.project.run
    options = Options(
        jobs=(not wishes.on and wishes.jobs) or run.get("jobs", 1),
        device=wishes.device or run.get("device", "auto"),
        keep_going=wishes.keep_going,
        wait=not wishes.no_wait,
        threads=run.get("threads", 1),
        how=how_to_run(run, wishes.vram),
        cluster=cluster_named(session, wishes.on),
        jobs_elsewhere=wishes.jobs or JOBS_ELSEWHERE,
    )
    view = reporter(sys.stdout, session, as_json=wishes.json, plain=wishes.plain)
    if made.to_do:
        refuse_mistakes(session, made)
        note_warnings(session, made, view.note)
    if cost := trainings_in_words(session, made):
        view.note(cost)
    build = Build(session, LocalExecutor(options.threads), view, options)
    began = time.monotonic()
    try:
        summary = build.run(wanted)
    finally:
        view.close()
    conclude(session, summary, time.monotonic() - began, as_json=wishes.json)
    if session.project.max_cache:
        from sdforge.bounded import keep_bounded

        keep_bounded(session, as_json=wishes.json)
    return exit_code(list(summary.failed.values()))


def cluster_named(session: Session, where: str) -> Cluster | None:
    """Return the cluster that `--on` names. Raises UsageError, ResourceError, and RecipeError for its settings."""
    if not where:
        return None
    from sdforge.executors.cluster import cluster

    refuse_strange_targets(session.project)
    return cluster(where, session.store.root / "jobs")


def how_to_run(run: dict[str, Any], vram: str) -> dict[str, Any]:
    """Return what runners are told of `[run]`; vram: the command line's, which goes first. Raises UsageError."""
    vram = vram or run.get("vram", "")
    found: dict[str, Any] = {key: run[key] for key in ("states", "samples", "tensorboard") if run.get(key)}
    if not vram:
        return found
    if not re.fullmatch(VRAM, vram):
        raise UsageError(f"{vram!r} is no amount of memory", hint="as in --vram 8GB or --vram 500MiB")
    return found | {"vram": amount(vram)}


def conclude(session: Session, summary: Summary, spent: float, *, as_json: bool) -> None:
    """Say what a build did, and what of it is not what the lock says."""
    plan = summary.plan
    assert plan is not None
    done = {*summary.built, *summary.fetched, *summary.restored}
    reused = [s for s in plan.steps.values() if s.state == "reuse" and s.id not in done and s.listed]
    counts = {
        "fetched": len(summary.fetched),
        "built": len(summary.built),
        "restored": len(summary.restored),
        "reused": len(reused),
        "failed": len(summary.failed),
        "skipped": len(summary.skipped),
    }
    judged = [step for step in plan.steps.values() if step.differs or step.id in {*summary.built, *summary.fetched}]
    strange = [against_pin(session, step) for step in judged if step.content_key in summary.pinned]
    if as_json:
        for identifier in summary.skipped:
            step = plan.steps[identifier]
            about = {"target": step.id, "method": step.node.target.signature.name, "key": step.content_key or step.key}
            print(json.dumps({"v": 1, "event": "action", **about, "state": "skipped", "reason": ["needs what failed"]}))
        for found in filter(None, strange):
            print(json.dumps({"v": 1, "event": "pin", **found}))
        print(json.dumps({"v": 1, "event": "result", **counts, "seconds": round(spent, 3)}))
        return
    called = names(plan)
    width = width_of(called[identifier] for identifier in summary.skipped)
    for identifier in summary.skipped:
        say(f"  – {called[identifier]:<{width}} not built: needs what failed")
    for text in barred(plan):
        say(f"  {text}")
    for found in filter(None, strange):
        say(f"  {found['text']}")
    text = ", ".join(f"{n} {word}" for word, n in counts.items() if n)
    say(f"  {text or 'nothing to do'} in {seconds(spent)}")
    for hint in dict.fromkeys(error.hint for error in summary.failed.values() if isinstance(error, CheckFailed)):
        say(f"  {hint}")
    if any(not isinstance(error, CheckFailed) for error in summary.failed.values()):
        say("  what was built is kept; the same command goes on from there")


def against_pin(session: Session, step: Step) -> dict[str, Any]:
    """Say whether a trained result equals its pin, and if not, how far it is and what differs in the fingerprint."""
    if not step.pin or not step.result:
        return {}
    if not step.differs:
        return {"target": step.id, "equal": True, "text": f"{short(step)} equals its pin {step.pin.digest[:8]}"}
    record = session.store.record(step.result)
    far = distance(step.pin, record)
    names = sorted({*step.pin.fingerprint, *step.result.fingerprint})
    other = {n: [step.pin.fingerprint.get(n), step.result.fingerprint.get(n)] for n in names}
    other = {name: pair for name, pair in other.items() if pair[0] != pair[1]}
    text = f"{short(step)} differs from its pin: {step.result.digest[:8]} instead of {step.pin.digest[:8]}"
    if far is not None:
        text += f", about {far:.2g} of its update away"
    told = {name: ["not known" if value is None else value for value in pair] for name, pair in other.items()}
    differences = ", ".join(f"{name} {before} → {now}" for name, (before, now) in told.items())
    text += f" (made elsewhere: {differences})" if differences else " (the fingerprint is the same)"
    text += "; what follows from it differs too, and the lock stays as it is"
    return {"target": step.id, "equal": False, "distance": far, "fingerprint": other, "text": text}


def show_plan(
    session: Session, plan: Plan, *, as_json: bool, blocks: bool = False, asked: dict[str, Resources] | None = None
) -> None:
    """Print the plan: states, reasons, time from history, disk needed and free.

    blocks: also what each block gets; asked: id → what a step would ask for as a job, to be shown beside it. Raises
    ResourceError where the disk is too small.
    """
    asked = asked or {}
    explainer = Explainer(session, plan)
    rows = [(step, explainer.causes(step) if step.to_do else []) for step in plan.steps.values() if step.listed]
    if as_json:
        jobs = {name: {"resources": each._asdict()} for name, each in asked.items()}
        actions = [_planned(session, step, causes, blocks=blocks) | jobs.get(step.id, {}) for step, causes in rows]
        (needed, free), (spent, _) = room(session, plan), total(session, plan)
        print(
            json.dumps({"v": 1, "event": "plan", "actions": actions, "bytes": needed, "free": free, "seconds": spent})
        )
        refuse_lack(session, plan)
        return
    called = names(plan)
    width = width_of(called[step.id] for step, _ in rows)
    for step, causes in rows:
        say(row(step, called[step.id], plan_text(session, step, causes), width=width))
        if step.id in asked:
            say(f"{' ' * INSET}a job: {asked[step.id]}")
        if blocks and (table := block_table(step)):
            say("\n".join(f"      {line}".rstrip() for line in table.lines()))
    for step in plan.steps.values():
        if text := weights_off(step, called[step.id]):
            say(f"  note: {text}")
        for _, text in unheeded(step):
            say(f"  note: {called[step.id]}: {text}; {IN_FRONT}")
    for grid in lacking(session, plan):
        say(f"  {glyphs()['build']} out/{grid.name}/{PICTURE} will be drawn from the cells")
    said = {(code, link.id): words for step in plan.steps.values() for link, code, words in doubts(plan, step)}
    for text, hint in said.values():
        say(f"  note: {text}; {hint}")
    for step in plan.steps.values():
        if step.id in plan.wanted and step.node.target.signature.makes == "files":
            for text in against_licence(session, plan, step):
                say(f"  note: {text}")
    counts = [
        f"{sum(s.state == state for s, _ in rows)} {word}"
        for state, word in (("build", "to build"), ("maybe", "perhaps"), ("fetch", "to fetch"), ("reuse", "reused"))
        if any(s.state == state for s, _ in rows)
    ]
    if session.unreachable:
        say(f"  note: {session.unreachable}")
    for text in [*session.doubts(), *barred(plan)]:
        say(f"  note: {text}")
    counts += [f"{sum(s.restore for s, _ in rows)} to restore"] if any(s.restore for s, _ in rows) else []
    cost = [cost_in_words(session, plan)] if plan.to_do else []
    say(f"  {' · '.join([', '.join(counts), *cost])}. Nothing was done.")
    refuse_lack(session, plan)


def cost_in_words(session: Session, plan: Plan) -> str:
    """Return how long a plan will take, as far as that is known, and what it needs of the disk."""
    (needed, free), (spent, complete) = room(session, plan), total(session, plan)
    known = f"about {seconds(spent)}{'' if complete else ' and what has never run here'}"
    disk = f" · +{size(needed)} (free: {size(free)})" if needed else ""
    return f"{known if complete or spent else 'how long is not known yet'}{disk}"


def trainings_in_words(session: Session, plan: Plan) -> str:
    """Return what will be trained and its cost, "" for a plan without trainings: said before the first one begins."""
    found = [s for s in plan.to_do if s.node.target.signature.group == "trainings" and s.state in ("build", "maybe")]
    if not found:
        return ""
    steps = sum(json.loads(step.node.target.settings).get("steps", 0) - begun(session, step) for step in found)
    maybe = "at most " if any(step.state == "maybe" for step in found) else ""
    many = f", {maybe}{counted(steps, 'step')}" if steps else ""
    return f"{counted(len(found), 'training')}{many} · {cost_in_words(session, plan)}"


def _planned(session: Session, step: Step, causes: list[Cause], *, blocks: bool) -> dict[str, Any]:
    """Return a step of a plan as `--json` has it."""
    row: dict[str, Any] = {
        "target": step.id,
        "method": step.node.target.signature.name,
        "key": step.content_key or step.key,
        "state": step.state,
        "restore": step.restore,
        "differs": step.differs,
        "within": step.within,
        "reason": [cause.text for cause in causes],
        "seconds": estimate(session, step) if step.to_do else 0,
    }
    if step.result and step.result.kind == "verdict":
        row["passed"] = not step.failed
    if step.state == "build" and (since := begun(session, step)):
        row["resumes"] = since
    if blocks and (table := block_table(step)):
        row["blocks"] = table.to_json()
    return row


def plan_text(session: Session, step: Step, causes: list[Cause]) -> str:
    """Return what stands behind a step in the plan: time, and the reason in short."""
    if step.barred or step.idle:
        return remark(step)
    if step.result is not None and step.result.kind == "verdict":
        return str(step.result.facts["says"])
    if not step.to_do:
        return f"computed within {other_name(step, step.within)}" if step.within else ""
    guess = estimate(session, step)
    clock = "" if guess is None else f"~{seconds(guess)}"
    if step.state == "maybe":
        clock = f"0 or {clock or 'as long as it takes'}"
    verb = "train: " if step.reason and step.node.target.signature.group == "trainings" else ""
    reason = f"{verb}{in_short(causes)}"
    if since := begun(session, step):
        reason += f"; goes on from step {since}"
    return f"{clock:<10} {reason}" if clock else reason


def barred(plan: Plan) -> list[str]:
    """Say which checks are not made here, and how they would be."""
    called = names(plan)
    return [
        f"{called[step.id]} is not run: a recipe may be a stranger's. To let it run here, read its command, and put "
        f"{json.dumps(step.node.target.raw['command'])} under [checks] commands in {LOCAL}, or build with "
        "--allow-commands"
        for step in plan.steps.values()
        if step.barred
    ]


def other_name(step: Step, identifier: str) -> str:
    """Return how another step is called where this one is spoken of: its recipe is left out where it is the same."""
    recipe, _, name = identifier.partition(":")
    return name if recipe == step.node.recipe.name else identifier


def why(session: Session, names: list[str], *, as_json: bool) -> int:
    """`forge why`: say why a target would be made, or that it is reused."""
    wanted = session.resolve(names)
    plan = session.plan(session.ends(wanted))
    explainer = Explainer(session, plan)
    for identifier in wanted:
        step = plan.steps[identifier]
        causes = explainer.causes(step)
        if as_json:
            print(
                json.dumps(
                    {
                        "v": 1,
                        "event": "why",
                        "target": step.id,
                        "state": step.state,
                        "key": step.content_key or step.key,
                        "reason": _causes_json(causes, set()),
                    }
                )
            )
        else:
            _tell(session, step, causes)
    return 0


def _causes_json(causes: list[Cause], told: set[int], depth: int = 1) -> list[dict[str, Any]]:
    """Return reasons as `--json` has them, those of each target once. told: which have been, by identity."""
    rows = []
    for cause in causes:
        row: dict[str, Any] = {"text": cause.text} | ({"place": str(cause.place)} if cause.place else {})
        again = id(cause.behind) in told
        behind = [] if again or depth == MOST_BEHIND else cause.behind
        told |= {id(behind)} if behind else set()
        rows.append(row | {"behind": _causes_json(behind, told, depth + 1)} | ({"above": True} if again else {}))
    return rows


def _tell(session: Session, step: Step, causes: list[Cause]) -> None:
    name = short(step)
    if not step.to_do and not step.restore:
        digest = step.result.digest[:8] if step.result else ""
        if step.within:
            say(f"{name} is not made by itself: {other_name(step, step.within)} alone takes it, and computes it within")
        elif step.idle:
            say(f"{name}: {IDLE} for it, `forge show {step.id}` says what its parts are")
        elif step.state == "unneeded":
            say(f"{name} is not needed: nothing that is wanted reads its bytes")
        elif step.result and step.key != step.result.key:
            say(f"{name} is reused: {digest} (same input bytes as when it was made: result kept)")
        else:
            say(f"{name} is reused: {digest}, all its inputs and settings are equal")
    elif step.restore:
        say(f"{name} is restored: what it is made from has not changed, its files in out/ are not whole")
    else:
        say(
            f"{name} would be made{' again' if session.chronicle.last_key(step.id) else ''} because"
            if step.state == "build"
            else f"{name} may have to be made again, after what it is made from:"
        )
    _tell_causes(causes, set())
    if step.result and step.result.kind == "verdict":
        say(f"  it {'passed' if step.passed else 'failed'}: {step.result.facts['says']}")
    if step.result:
        record = session.store.record(step.result)
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(step.result.made))
        device = step.result.fingerprint.get("device", "")
        where = f" on {device}" if device else ""
        say(f"  last made {made}{where}, {seconds(record.get('seconds', 0))} → {step.result.digest[:8]}")


def _tell_causes(causes: list[Cause], told: set[int], depth: int = 1) -> None:
    """Say reasons, those of each target once. told: which have been, by identity."""
    for cause in causes:
        place = f"    {cause.place.file}:{cause.place.line}" if cause.place and cause.place.line else ""
        again = id(cause.behind) in told
        said = " (as above)" if again else " …" if cause.behind and depth == MOST_BEHIND else ""
        say(f"{'  ' * depth}{cause.text}{said}{place}")
        if cause.behind and not (again or depth == MOST_BEHIND):
            told.add(id(cause.behind))
            _tell_causes(cause.behind, told, depth + 1)


# -- check and lock ----------------------------------------------------------------------------------------------------


def check(session: Session, names: list[str], *, as_json: bool) -> int:
    """`forge check`: find every mistake that headers and texts can show; nothing is hashed and nothing runs."""
    session.sources.quick = True
    recipes = names or session.project.recipe_names()
    problems: list[Problem] = [] if names else session.project.misnamed() + strange_targets(session.project)
    for name in recipes:  # each on its own, so that one recipe's mistakes do not hide another's
        try:
            meant = session.project.variants(name) if MARK in name else session.project.with_variants(name)
            session.open_recipes(meant)
            plan = session.plan([i for i, node in session.graph.nodes.items() if node.recipe.name in meant])
            said = dict.fromkeys(advice(session, plan))  # variants say the same at the same place
            problems += [problem for problem in said if problem not in problems]
        except RecipeError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        from sdforge.report.problems import show_problems

        show_problems(problems, as_json=as_json)
    errors = [problem for problem in problems if not problem.warning]
    if not errors:
        if as_json:
            print(json.dumps({"v": 1, "event": "result", "recipes": len(recipes), "errors": 0}))
        else:
            say(f"{len(recipes)} recipe{'' if len(recipes) == 1 else 's'}: no mistakes found")
    return 2 if errors else 0


def lock(session: Session, wishes: argparse.Namespace) -> int:
    """`forge lock`: pin sources and what is in the store; choose between results; drop results no recipe reaches."""
    path = session.project.lock
    if wishes.take:
        return take(session, wishes.take, as_json=wishes.json)
    pinned = _pin_sources(session, wishes)
    names = session.project.preset_names()
    session.open_recipes(names)
    plan = session.plan(list(session.graph.nodes))
    if wishes.prune:
        used = {step.content_key for step in plan.steps.values() if step.content_key}
        gone: list[str] = []

        def prune(text: Lock) -> None:
            gone.extend(sorted(set(text.results) - used))
            text.results = {key: pins for key, pins in text.results.items() if key in used}

        LockFile(session).rewrite(prune)
        words = f"{len(gone)} result{'' if len(gone) == 1 else 's'} dropped"
        _tell_lock(words, as_json=wishes.json, dropped=gone)
        return 0
    file = LockFile(session)
    before = path.read_bytes() if path.is_file() else b""
    anew = file.write(plan)
    same = path.is_file() and path.read_bytes() == before
    lines = [f"source {name} is pinned anew: it is not the one it was" for name in anew]
    lines += [f"source {name} is pinned: {session.lock.sources[name]['resolved']}" for name in pinned]
    lines.append("the lock was up to date" if same and not pinned else f"{LOCK} is written")
    _tell_lock("\n".join(lines), as_json=wishes.json, written=not same or bool(pinned), anew=[*pinned, *anew])
    return 0


def _pin_sources(session: Session, wishes: argparse.Namespace) -> list[str]:
    """Pin what sources from elsewhere stand for, before their bytes are asked for. Returns those that are new."""
    from sdforge.fetch.command import remote_sources, resolve_all

    sources = remote_sources(session, [])
    if sources and wishes.offline and wishes.update:
        names = ", ".join(taken.id for taken in sources)
        raise ResourceError(
            f"what {names} {'is' if len(sources) == 1 else 'are'} now has to be asked for, and --offline asks nobody",
            hint="run it without --offline",
        )
    if not sources or wishes.offline:
        return []
    return resolve_all(session, sources, update=wishes.update, as_json=wishes.json)


def take(session: Session, digest: str, *, as_json: bool) -> int:
    """Let one of two results of the same inputs be the pinned one."""
    taken: list[tuple[str, str]] = []

    def choose(text: Lock) -> None:
        meant = [(key, each) for key, pins in text.results.items() for each in pins if each.startswith(digest)]
        meant = [(key, each) for key, each in meant if len(text.results[key]) > 1] or meant  # between which is chosen
        if not meant:
            raise UsageError(f"the lock holds no result {digest!r}", hint="the digests stand behind [result.KEY.…]")
        if len(meant) > 1:
            named = ", ".join(each[:12] for _, each in meant[:MOST_NAMED])
            raise UsageError(f"{digest!r} begins several results of the lock: {named}", hint="write more of it")
        ((key, found),) = meant
        text.results[key] = {found: text.results[key][found]}
        taken.append((key, found))

    LockFile(session).rewrite(choose)
    ((key, found),) = taken
    _tell_lock(f"{found[:12]} is the pinned result of {key[:12]} now", as_json=as_json, key=key, digest=found)
    return 0


def _tell_lock(words: str, *, as_json: bool, **fields: Any) -> None:
    say(json.dumps({"v": 1, "event": "lock", **fields}) if as_json else words)
