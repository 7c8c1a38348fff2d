"""Why a target would be made, or is reused: the difference of two manifests, in words and with places."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from sdforge.artifact import Artifact
from sdforge.errors import Place
from sdforge.graph import Link, recipe_place, use_place
from sdforge.identity import number
from sdforge.manifest import Change, changes
from sdforge.plan import Plan, Step
from sdforge.session import Session


@dataclass
class Cause:
    """One reason. place: where it was written; behind: the reasons of what changed it."""

    text: str
    place: Place | None = None
    behind: list[Cause] = field(default_factory=list)


class Explainer:
    """Explains the steps of one plan."""

    def __init__(self, session: Session, plan: Plan) -> None:
        self.session, self.plan = session, plan
        self._known: dict[str, list[Cause]] = {}

    def causes(self, step: Step) -> list[Cause]:
        """Return why a step is what it is: nothing if it is reused as it was.

        What lies behind it is explained first, so that a long chain is no deep recursion.
        """
        pending = [step]
        while pending:
            last = pending[-1]
            before = [self.plan.steps[link.id] for link, _ in last.inputs if link.id in self.plan.steps]
            unknown = [each for each in before if each.id not in self._known]
            if last.id not in self._known and unknown:
                pending += unknown
                continue
            pending.pop()
            if last.id not in self._known:
                self._known[last.id] = []  # no circles: previews wait for the checks that look at them
                self._known[last.id] = list(self._causes(last))
        return self._known[step.id]

    def _causes(self, step: Step) -> list[Cause]:
        if step.id in self.session.retrain:
            return [Cause("it was asked for (--retrain)")]
        if step.reason:
            return [Cause(step.reason)]
        if failed := [check for check in step.checks if check.state == "reuse" and not check.passed]:
            return [Cause(f"`{check.node.target.name}` failed", None, self.causes(check)) for check in failed]
        if not step.to_do and self.session.chronicle.last_key(step.id) in ("", step.key):
            return []
        unknown = [link for link, artifact in step.inputs if artifact is None]
        if unknown:
            return [self._behind(link, "is made first") for link in unknown]
        old = self._before(step)
        if old is None:
            return [Cause("it has never been made here")] if step.to_do else []
        new = json.loads(step.manifest) if step.manifest else {}
        found = self._differences(step, old, new)
        if not found and step.to_do:
            return [Cause("its bytes are needed, and are not in the store")]
        return found

    def _before(self, step: Step) -> dict[str, Any] | None:
        """The manifest with which a target was last made, as far as store or lock remember it."""
        last = self.session.chronicle.last_key(step.id)
        if last and (manifest := self.session.store.preimage(last)):
            return manifest
        row = self.session.lock.targets.get(step.id, {})
        if manifest := self.session.store.preimage(row.get("key", "")):
            return manifest
        for pin in self.session.lock.pins(row.get("key", "")).values():
            settings = dict(pin.settings)
            seed = {"seed": settings.pop("seed")} if "seed" in settings else {}
            return {
                "method": pin.method,
                "version": pin.method_version,
                "settings": settings,
                "inputs": pin.inputs,
            } | seed
        return None

    def _differences(self, step: Step, old: dict[str, Any], new: dict[str, Any]) -> list[Cause]:
        found: list[Cause] = []
        roles: set[str] = set()
        for change in changes(old, new):
            head = change.path[0]
            if head in ("settings", "seed"):
                found.append(self._setting(step, change))
            elif head == "inputs":
                roles.add(change.path[1])
            elif head == "code" and change.old is None:
                continue  # the lock does not hold it
            elif head in ("version", "code", "method"):
                what = {"version": step.node.target.signature.name, "method": "method"}.get(head, change.path[-1])
                found.append(Cause(f"{what} {shown(change.old)} → {shown(change.new)}"))
        for role in sorted(roles):
            found += self._inputs(step, role, old["inputs"].get(role))
        if not found and old.get("lineage") != new.get("lineage"):
            found.append(
                Cause("its bytes are the same; the files tell in their headers how it was made, and that changed")
            )
        return found

    def _setting(self, step: Step, change: Change) -> Cause:
        name = ".".join(change.path[1:]) or change.path[0]
        target = step.node.target
        recipe = step.node.recipe
        path = (*target.path, *change.path[1:]) if len(change.path) > 1 else (*target.path, change.path[0])
        return Cause(
            f"{name} {shown(change.old)} → {shown(change.new)}", recipe_place(self.session.project, recipe, *path)
        )

    def _inputs(self, step: Step, role: str, old: Any) -> list[Cause]:
        """What changed among the inputs of a role."""
        links = [(link, artifact) for link, artifact in step.inputs if link.use.role == role]
        before = [json.dumps(item, sort_keys=True) for item in (old if isinstance(old, list) else [old])]
        found = []
        for link, artifact in links:
            assert artifact is not None
            spec = step.node.target.role(role)
            named = json.loads(artifact.named(spec.reads, spec.facts))
            item = {"artifact": named, "use": link.use.use or {}} if spec.many == "table" else named
            if json.dumps(item, sort_keys=True) not in before:
                found.append(self._input(step, link, artifact, (old, item)))
        if not found:
            count_old, count_new = len(before), len(links)
            text = "their order" if count_old == count_new else f"their number, {count_old} → {count_new}"
            found.append(Cause(f"{role}: {text}"))
        return found

    def _input(self, step: Step, link: Link, artifact: Artifact, rows: tuple[Any, Any]) -> Cause:
        """Return how an input differs. rows: what the manifests have of its role before, and of it now."""
        (old, new), name = rows, link.use.reference
        if artifact.kind == "pictures":
            return self._behind(link, "changed")
        if artifact.whole:
            what = "picture" if artifact.kind == "picture" else "data set"
            return Cause(f"{what} `{name}` changed", None, self._pictures(artifact, old))
        candidates = old if isinstance(old, list) else [old]
        parts: list[str] = []
        place: Place | None = None
        if len(candidates) == 1 and isinstance(candidates[0], dict):
            inner_old = candidates[0].get("artifact", candidates[0])
            inner_new = new.get("artifact", new)
            for change in changes(inner_old, inner_new):
                kind, what = change.path[0], ".".join(change.path[1:])
                parts.append(what if kind == "components" else f"{what} {shown(change.old)} → {shown(change.new)}")
            used = list(changes(candidates[0].get("use", {}), new.get("use", {})))
            parts += [f"{'.'.join(change.path)} {shown(change.old)} → {shown(change.new)}" for change in used]
            if used:
                place = use_place(self.session.project, step.node.recipe, step.node.target, link.use)
        return self._behind(link, f"changed{': ' + ', '.join(dict.fromkeys(parts)) if parts else ''}", place)

    def _behind(self, link: Link, text: str, place: Place | None = None) -> Cause:
        """Return what is said of an input. What passes through a step that changes nothing is called by its maker."""
        while (other := self.plan.steps.get(link.id)) is not None and other.idle:
            link = other.inputs[0][0]
        if other is None:
            return Cause(f"source `{link.use.reference}` {text}", place)
        return Cause(f"`{link.use.reference}` {text}", place, self.causes(other))

    def _pictures(self, artifact: Artifact, old: Any) -> list[Cause]:
        """Which pictures and captions of a data set changed."""
        before = self.session.store.preimage(old) if isinstance(old, str) else None
        if not before:
            return []
        was, now = _by_picture(before["rows"]), _by_picture(artifact.notes["rows"])
        names = {sha: found[0] for sha, found in {**before["names"], **artifact.notes["names"]}.items()}
        gone, come = (
            sorted(names[s] for s in was.keys() - now.keys()),
            sorted(names[s] for s in now.keys() - was.keys()),
        )
        lines = [f"~ {name} (its pixels)" for name in come if name in gone]
        lines += [f"+ {name}" for name in come if name not in gone] + [f"- {name}" for name in gone if name not in come]
        for sha in sorted(was.keys() & now.keys(), key=lambda s: names[s]):
            for old_row, new_row in zip_longest(was[sha], now[sha], fillvalue=[None]):
                if old_row != new_row:
                    lines.append(f"~ {names[sha]}: {shown(old_row[0])} → {shown(new_row[0])}")
        return [Cause(line) for line in lines]


def _by_picture(rows: list[list[Any]]) -> dict[str, list[list[Any]]]:
    """Return sha256 of a picture → the rest of its rows."""
    found: dict[str, list[list[Any]]] = {}
    for sha256, *rest in rows:
        found.setdefault(sha256, []).append(rest)
    return found


def shown(value: Any) -> str:
    """Return a value as a person reads it."""
    if value is None:
        return "nothing"
    if isinstance(value, float):
        return number(value)
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def in_short(causes: list[Cause]) -> str:
    """Return the first reasons in one line; a single one with what is behind it, where that is short."""
    alone: list[Cause] = []
    while len(causes) == 1 and causes[0].behind:
        alone.append(causes[0])
        causes = causes[0].behind
    text = "; ".join(cause.text for cause in causes[:3]) + ("; …" if len(causes) > 3 else "")
    for cause in reversed(alone):
        text = f"{cause.text} ({text})" if len(text) < 60 else cause.text
    return text
