"""The plan ↔ `forge.lock`: what is pinned, what differs from it, and when it is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sdforge.artifact import Artifact, Component, differing
from sdforge.errors import BrokenPromise, counted
from sdforge.lock import BEGINNING, Lock, Pin, pin_of, read_lock, update_lock
from sdforge.places import LOCK
from sdforge.plan import Plan, Step
from sdforge.store.entries import Result
from sdforge.store.files import Lock as FileLock
from sdforge.store.files import publish_bytes
from sdforge.variants import split

if TYPE_CHECKING:
    from sdforge.session import Session


class LockFile:
    """The lock of a session's project. replace: content keys whose pins are replaced when it is written."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.replace: set[str] = set()

    # -- reading ---------------------------------------------------------------------------------------------------

    def check(self, plan: Plan) -> None:
        """With `--locked`: refuse everything that the lock does not hold. Raises BrokenPromise naming all of it."""
        if not self.session.locked:
            return
        found = self.differences(plan)
        if found:
            raise BrokenPromise(
                "the lock does not hold what is asked for:\n  " + "\n  ".join(found),
                hint="`forge build` without --locked brings it up to date",
            )

    def differences(self, plan: Plan) -> list[str]:
        """Return, sentence by sentence, in what sources and targets differ from the lock."""
        lock, found = self.session.lock, []
        for name, row in self._source_rows(plan).items():
            if name not in lock.sources:
                found.append(f"source {name} is not in the lock")
            elif (pinned := lock.sources[name].get("digest", "")) != row["digest"]:
                found.append(
                    f"source {name} is not the one that is pinned ({row['digest'][:12]} instead of "
                    f"{pinned[:12] or 'none that was read'}){_other_files(lock.sources[name], row)}"
                )
        for step in plan.steps.values():
            signature = step.node.target.signature
            if not signature.pinned or signature.kind == "moves":
                continue
            if signature.kind == "content":
                if not step.pin:
                    found.append(
                        f"{step.id} is not in the lock"
                        if step.content_key
                        else f"{step.id} is not in the lock, or what it is made from has changed"
                    )
                elif step.differs:
                    found.append(
                        f"{step.id}: the pinned result {step.pin.digest[:12]} is not to be had, only another one"
                    )
                elif step.to_do and step.state != "fetch":
                    found.append(f"{step.id}: the pinned result {step.pin.digest[:12]} is not to be had")
            elif step.key and step.id not in lock.targets:
                found.append(f"{step.id} is not in the lock")
            elif step.key and lock.targets[step.id].get("key") != step.key:
                found.append(f"{step.id} has changed since the lock was written")
        return found

    def compare(self, step: Step, components: dict[str, Component]) -> None:
        """Refuse a formula's result that is not what the lock says of the same inputs. Raises BrokenPromise."""
        row = self.session.lock.targets.get(step.id, {})
        if row.get("key") != step.key or "digest" not in row or step.artifact is None:
            return
        made = replace(step.artifact, components=step.artifact.components | components)
        if made.digest and made.digest != row["digest"]:
            where = self._where(step, row, made)
            raise BrokenPromise(
                f"{step.id} came out as {made.digest[:12]}, and the lock says {row['digest'][:12]} for the same inputs"
                f"{f': {where}' if where else ''}",
                hint="one of the two machines computes wrongly, or a method changed without its version; "
                "nothing was kept",
            )

    def _where(self, step: Step, row: dict[str, Any], made: Artifact) -> str:
        """Name the components that are not as the lock has them, each with its first tensor where that can be told."""
        said = row.get("components", {})
        return ", ".join(
            name + self._first(step.key, said[name], component)
            for name, component in sorted(made.components.items())
            if not component.content.startswith(said.get(name, component.content))
        )

    def _first(self, key: str, beginning: str, made: Component) -> str:
        """Name the first tensor that differs from what the store still lists of the component before; else ""."""
        store = self.session.store
        for before in (c for result in store.known(key).results for c in result.components.values()):
            if made.dtype and before.content.startswith(beginning):
                tensors: list[str] = []
                with suppress(BrokenPromise):  # the list may be lost as the bytes are
                    tensors = differing(store.table(before), store.table(made))
                if tensors:
                    return f" ({tensors[0]} is the first of {counted(len(tensors), 'tensor')})"
        return ""

    def is_settled(self, plan: Plan) -> bool:
        """Say whether there is nothing to note beside the plan: no alias, no row of the lock.

        Raises BrokenPromise as `check` does.
        """
        self.check(plan)
        changes = self.changes(plan)
        return not (plan.aliases or plan.notes or changes.sources or changes.targets or changes.results)

    # -- pinning ---------------------------------------------------------------------------------------------------

    def pin(self, step: Step, result: Result, manifest: str) -> Pin:
        """Return a result as the lock holds it."""
        record = self.session.store.record(result)
        return pin_of(replace(result, record=record), [step.key], json.loads(manifest))

    def pin_new(self, step: Step, result: Result, manifest: str) -> None:
        """Pin a result if its key has no pin yet, and write that down at once."""
        if not self.session.lock.pins(result.key):
            pin = self.pin(step, result, manifest)
            self.session.lock.pin(pin, replace=False)
            changes = Lock()
            changes.pin(pin, replace=False)
            self._update(changes, set())

    # -- writing ---------------------------------------------------------------------------------------------------

    def changes(self, plan: Plan) -> Lock:
        """Return the entries of the lock that a finished (or idle) plan changes."""
        lock, changes = self.session.lock, Lock()
        for name, row in self._source_rows(plan).items():
            if lock.sources.get(name) != row:
                changes.sources[name] = row
        tainted: set[str] = set()
        for step in plan.steps.values():
            follows = any(link.id in tainted for link, _ in step.inputs)
            if step.differs or follows:
                tainted.add(step.id)
            signature = step.node.target.signature
            if step.artifact is None and not step.result:
                continue
            if signature.kind == "content" and signature.pinned:
                self._pin_chosen(step, changes)
            if not follows and signature.makes not in ("pictures", "verdict"):
                row = self._target_row(step)
                if row and lock.targets.get(step.id) != row:
                    changes.targets[step.id] = row
        return changes

    def _pin_chosen(self, step: Step, changes: Lock) -> None:
        """A result that is used and not pinned gets its pin; a new plan key is added to the pin it leads to."""
        pins = self.session.lock.pins(step.content_key)
        if not step.result:
            if step.pin and not pins:  # a trusted key vouches for it, and nobody reads its bytes
                changes.pin(
                    replace(step.pin, plans=sorted({*step.pin.plans, step.key} - {step.pin.key})), replace=False
                )
            return
        known = pins.get(step.result.digest)
        if self.replace and step.content_key in self.replace:
            changes.pin(self.session.lock.pins(step.content_key)[step.result.digest], replace=True)
        elif not pins:
            manifest = self.session.store.preimage(step.content_key) or json.loads(step.manifest)
            changes.pin(self.pin(step, step.result, json.dumps(manifest)), replace=False)
        elif known and step.key != step.content_key and step.key not in known.plans:
            changes.pin(replace(known, plans=sorted({*known.plans, step.key})), replace=False)

    def _target_row(self, step: Step) -> dict[str, Any]:
        key = (step.content_key or step.key) if step.kind == "content" else step.key
        row = {"key": key} if key else {}
        old = self.session.lock.targets.get(step.id, {})
        if key and old.get("key") == key and "digest" in old:
            return old
        chosen = step.pin if step.differs else step.result
        digest = chosen.digest if chosen and step.kind == "content" else ""
        if digest or not step.artifact or not step.artifact.digest:
            return row | ({"digest": digest} if digest else {})
        parts = {name: c.content[:BEGINNING] for name, c in step.artifact.components.items()}
        return row | {"digest": step.artifact.digest} | ({"components": parts} if step.kind == "formula" else {})

    def _source_rows(self, plan: Plan) -> dict[str, dict[str, Any]]:
        rows = {}
        for step in plan.steps.values():
            for link, artifact in step.inputs:
                if artifact is not None and link.id in self.session.graph.sources and link.id not in rows:
                    rows[link.id] = self._resolved(link.id) | _source_row(artifact)
        return rows

    def _resolved(self, identifier: str) -> dict[str, Any]:
        """Return what the lock says of where a source from elsewhere was found; it stays as it is."""
        row = self.session.lock.sources.get(identifier, {})
        same = row.get("from") == self.session.graph.sources[identifier].table.get("from")
        return {name: row[name] for name in ("from", "resolved") if same and name in row}

    def write(self, plan: Plan) -> list[str]:
        """Bring the lock up to date; return the sources that are others than those that were pinned."""
        changes = self.changes(plan)
        known = self._known_targets(plan)
        gone = {
            name
            for name in self.session.lock.targets
            if name.split(":")[0] in known and name not in known[name.split(":")[0]]
        }
        pinned = {name: row["digest"] for name, row in self.session.lock.sources.items() if "digest" in row}
        anew = sorted(n for n, row in changes.sources.items() if pinned.get(n, row["digest"]) != row["digest"])
        if changes.sources or changes.targets or changes.results or gone:
            changes.targets |= {
                name: row
                for name, row in self.session.lock.targets.items()
                if name.split(":")[0] in known and name not in gone and name not in changes.targets
            }
            self._update(changes, set(known))
        return anew

    def _known_targets(self, plan: Plan) -> dict[str, set[str]]:
        """The recipes of a plan → the ids of all their targets."""
        recipes = {step.node.recipe.name: step.node.recipe for step in plan.steps.values()}
        known = {
            name: {f"{name}:{target}" for target in recipe.targets if target not in recipe.shared}
            for name, recipe in recipes.items()
        }
        homes = {recipe.home for recipe in recipes.values()}
        for name in {identifier.split(":")[0] for identifier in self.session.lock.targets} - known.keys():
            home, variant = split(name)
            if variant and home in homes and variant not in self.session.project.recipe(home).variants:
                known[name] = set()  # a variant that is no more
        return known

    def _update(self, changes: Lock, known: set[str]) -> None:
        update_lock(self.session.project.lock, self.guard(), changes, self.replace, known)
        self.session.read_lock()

    def rewrite(self, change: Callable[[Lock], None]) -> None:
        """Change the lock as it lies on the disk now, one writer at a time."""
        path = self.session.project.lock
        with self.guard() as guard:
            guard.acquire(wait=True)
            before = path.read_bytes() if path.is_file() else b""
            text = read_lock(before, LOCK) if before else Lock()
            change(text)
            if (after := text.dump().encode()) != before:
                publish_bytes(after, path, path.parent, 0o644)
        self.session.read_lock()

    def guard(self) -> FileLock:
        """Return the lock that is held by whoever writes one of the project's files that git keeps."""
        name = hashlib.sha256(str(self.session.project.root).encode()).hexdigest()[:16]
        return self.session.store.lock(f"lock-{name}")


def _other_files(pinned: dict[str, Any], found: dict[str, Any]) -> str:
    """Name the files by which a source differs from its pin."""
    files = pinned.get("files", {}), found.get("files", {})
    names = sorted(name for name in {*files[0], *files[1]} if files[0].get(name) != files[1].get(name))
    return f": {', '.join(names)}" if names and files[0] else ""


def _source_row(artifact: Artifact) -> dict[str, Any]:
    row: dict[str, Any] = {"digest": artifact.notes.get("digest") or artifact.identity}
    if "files" in artifact.notes:
        row |= {"files": artifact.notes["files"], "size": artifact.notes["size"]}
    return row


def distance(a: Pin, b: dict[str, Any]) -> float | None:
    """Return how far another result is from a pinned one, as a share of the pinned update's norm.

    None: unknown, also where what the lock has is no sketch. Estimated from 64 projections: the standard error is about
    an eleventh of the distance itself.
    """
    import base64
    import struct

    if not a.sketch or not b.get("sketch") or not a.norm:
        return None
    try:
        one, two = (struct.unpack("<64f", base64.b64decode(text)) for text in (a.sketch, b["sketch"]))
    except (ValueError, struct.error):
        return None
    squares = sum((x - y) ** 2 for x, y in zip(one, two, strict=True)) / 64
    return float(squares**0.5 / a.norm)
