"""`forge verify --rebuild TARGET`: make a target again, in a store of its own, and compare the bits.

Everything behind the target is made from the sources; nothing is taken from the cache, the lock or `out/`, and nothing
is written there. What came out is compared step by step with what cache or lock hold, tensor by tensor where both are
at hand.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, replace
from typing import Any

from sdforge.artifact import differing
from sdforge.build import Build
from sdforge.errors import BrokenPromise, UsageError, exit_code
from sdforge.executors.local import LocalExecutor
from sdforge.lock import Pin
from sdforge.lockfile import distance
from sdforge.outputs import Outputs
from sdforge.plan import Plan, Step
from sdforge.report.progress import reporter, short
from sdforge.report.words import glyphs, safe
from sdforge.session import Session
from sdforge.sources import Sources
from sdforge.store import Store
from sdforge.under_way import Options


@dataclass(frozen=True)
class Comparison:
    """What came of a step when it was made again.

    first, count: the first tensor (or file) that differs, and how many do. distance: a trained result's, as a share of
    the update's norm. promised: whether its class promises equal bits here; follows: an input that differs.
    """

    step: Step
    equal: bool
    first: str = ""
    count: int = 0
    distance: float | None = None
    promised: bool = True
    follows: str = ""

    def text(self) -> str:
        """Say it."""
        if self.equal:
            return "equal, bit for bit"
        if self.follows:
            return f"follows from {self.follows}, which differs"
        text = f"differs: {self.first} is the first of {self.count}" if self.first else "differs"
        if self.distance is not None:
            text += f"; about {self.distance:.2g} of its update away"
        return text if self.promised else f"{text}; trained on another machine or version, where that is to be expected"

    def to_json(self) -> dict[str, Any]:
        fields = ("equal", "first", "count", "distance", "promised", "follows")
        return {"target": self.step.id, **{name: getattr(self, name) for name in fields}}


def rebuild(session: Session, name: str, *, as_json: bool) -> int:
    """Make a target again and compare; return 3 if it differs where equal bits are promised.

    Raises UsageError for a target that has not been built: there is nothing to compare with.
    """
    wanted = session.resolve([name])
    before = session.plan(wanted)
    unbuilt = [i for i in wanted if not _known(session, before.steps[i])]
    if unbuilt:
        raise UsageError(f"{unbuilt[0]} has not been built, so there is nothing to compare with", hint="build it first")
    work = session.store.workplace()
    try:
        project = replace(session.project, made=work)
        store = Store(work / "cache")
        store.prepare()
        fetched = session.store.fetched("").parent
        if fetched.is_dir():  # sources, which nobody has to get twice
            store.fetched("").parent.symlink_to(fetched)
        sources = Sources(project, store, session.sources.progress, pinned=session.sources.pinned)
        again = Session(project, store, sources, Outputs(project, store))
        again.checked = False  # what its pictures look like is another question
        wanted = again.resolve([name])
        code, after = _build(again, wanted, as_json=as_json)
        if code:
            return code
        found = compare(session, before, again, after)
        again.store.close()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for each in found:
        if as_json:
            print(json.dumps({"v": 1, "event": "compared", **each.to_json()}))
        else:
            sign = glyphs()["reuse" if each.equal else "failed" if each.promised else "warning"]
            print(safe(f"  {sign} {short(each.step):<18} {each.text()}", sys.stdout))
    return 3 if any(not each.equal and each.promised and not each.follows for each in found) else 0


def _build(again: Session, wanted: list[str], *, as_json: bool) -> tuple[int, Plan]:
    """Build in the other store; return the exit code, and the plan with everything in it."""
    run = again.project.run
    threads = run.get("threads", 1)
    options = Options(jobs=run.get("jobs", 1), device=run.get("device", "auto"), threads=threads)
    view = reporter(sys.stdout, again, as_json=as_json, plain=False)
    try:
        summary = Build(again, LocalExecutor(threads), view, options).run(wanted)
    finally:
        view.close()
    assert summary.plan is not None
    return exit_code(list(summary.failed.values())), summary.plan


def _known(session: Session, step: Step) -> bool:
    """Say whether cache or lock hold something to compare a step with."""
    row = session.lock.targets.get(step.id, {})
    locked = step.kind == "formula" and row.get("key") == step.key and "digest" in row
    return bool(step.result or step.pin or step.idle or locked)


def compare(one: Session, before: Plan, two: Session, after: Plan) -> list[Comparison]:
    """Compare what two sessions have of the steps of a plan, inputs first."""
    found: list[Comparison] = []
    differing: set[str] = set()
    for step in after.steps.values():
        old = before.steps[step.id]
        if step.idle or (step.artifact is None and step.result is None) or not _known(one, old):
            continue
        follows = next((link.id for link, _ in step.inputs if link.id in differing), "")
        each = _compared(one, old, two, step)
        if follows and not each.equal:
            each = replace(each, follows=follows.partition(":")[2])
        if not each.equal:
            differing.add(step.id)
        found.append(each)
    return found


def _compared(one: Session, old: Step, two: Session, new: Step) -> Comparison:
    if _digest(one, old) == _digest(two, new):
        return Comparison(new, equal=True)
    content = new.kind == "content"
    theirs = old.result.fingerprint if old.result else old.pin.fingerprint if old.pin else {}
    ours = new.result.fingerprint if new.result else {}
    names = _differing(one, old, two, new)
    return Comparison(
        new,
        equal=False,
        first=names[0] if names else "",
        count=len(names),
        distance=_distance(one, old, two, new) if content else None,
        promised=not content or theirs == ours,
    )


def _digest(session: Session, step: Step) -> str:
    """Name what a step came out as: the bytes of its result, or what the lock says of them."""
    if step.kind == "content":
        return step.result.digest if step.result else step.pin.digest if step.pin else ""
    whole = step.artifact.digest if step.artifact else ""
    return whole or session.lock.targets.get(step.id, {}).get("digest", "")


def _differing(one: Session, old: Step, two: Session, new: Step) -> list[str]:
    """Return the names of the tensors or files that differ, where both are at hand."""
    if new.result and old.result and new.result.files:
        files = (old.result.files, new.result.files)
        return sorted(n for n in {*files[0], *files[1]} if files[0].get(n) != files[1].get(n))
    if old.artifact is None or new.artifact is None:
        return []
    names: list[str] = []
    for name in sorted({*old.artifact.components, *new.artifact.components}):
        pair = old.artifact.components.get(name), new.artifact.components.get(name)
        if pair[0] is None or pair[1] is None:
            names.append(name)
        elif pair[0].content != pair[1].content and pair[0].table and not pair[0].table.startswith("plan:"):
            try:
                tensors = differing(one.store.table(pair[0]), two.store.table(pair[1]))
            except BrokenPromise:  # a tokenizer lists no tensors; a pinned result's table may not be here
                names.append(name)
                continue
            names += [f"{name}.{tensor}" for tensor in tensors]
    return names


def _distance(one: Session, old: Step, two: Session, new: Step) -> float | None:
    record = one.store.record(old.result) if old.result else {}
    pin = old.pin
    if record.get("sketch"):
        pin = Pin(old.content_key, "", sketch=record["sketch"], norm=record["norm"])
    return distance(pin, two.store.record(new.result)) if pin and new.result else None
