"""Backwards through a plan: whose bytes are needed, and so what has to run.

A formula whose bytes nobody takes but one other formula is computed within that one's pass, and kept nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

from sdforge.identity import canonical
from sdforge.lock import Lock
from sdforge.manifest import likeness
from sdforge.plan import Step, View, Wishes


class Taking(NamedTuple):
    """Who takes bytes: the key of an action ("" for a person, who wants them), and by which of its inputs."""

    key: str
    place: int = 0


class Needs:
    """Marks the steps of one plan with their states. whole: whether a preset's files lie in `out/` as made."""

    def __init__(
        self, steps: dict[str, Step], lock: Lock, view: View, whole: Callable[[Step], bool], wishes: Wishes
    ) -> None:
        self.steps, self.lock, self.view, self.whole, self.wishes = steps, lock, view, whole, wishes
        self._takers: dict[str, dict[str, dict[Taking, Step | None]]] = {}  # key → component → who takes its bytes

    def mark(self, wanted: list[str]) -> None:
        """State of every step what has to be done about it, so that all wanted ones are had."""
        for identifier in wanted:
            self._want(self.steps[identifier])
        self._join_passes()
        for step in self.steps.values():
            if step.state == "unneeded" and (step.result or (step.idle and step.artifact)):
                step.state = "reuse"

    def _want(self, step: Step) -> None:
        """Mark what is needed for a wanted target: all its bytes, and for a preset its files."""
        makes = step.node.target.signature.makes
        if step.node.target.placed:
            for check in step.checks:
                self._want(check)
            kept = step.result is not None and (makes == "files" or self.view.holds(step.result))
            step.state = "reuse" if kept else self._how(step)
            step.restore = kept and not self.whole(step)
            if not kept or (step.restore and makes == "files"):
                self._need_inputs(step)
            return
        if makes == "verdict":
            self._want_verdict(step)
            return
        if step.artifact is None:
            self._need(step)
            return
        for name, maker in step.makers.items():
            self._need_maker(maker, name, Taking(""), None)
        if step.state == "unneeded":
            step.state = "reuse"

    def _want_verdict(self, step: Step) -> None:
        """Mark what a check looks at, unless its verdict is known or this machine does not allow its command."""
        if step.result is not None:
            step.state = "reuse"
        elif not self.view.permits(step):
            step.state, step.barred = "unneeded", True
            step.reason = "this machine does not allow its command"
        elif step.state == "unneeded":
            step.state = self._how(step)
            self._need_inputs(step)

    def _need(self, step: Step) -> None:
        """Mark a step whose bytes are needed."""
        if step.state != "unneeded":
            return
        if step.result and self.view.holds(step.result):
            step.state = "reuse"
            return
        if step.idle:
            step.state = "reuse"
            self._need_inputs(step)
            return
        step.state = self._how(step)
        if step.state != "fetch":
            self._need_inputs(step)

    def _need_inputs(self, step: Step) -> None:
        for i, (link, artifact) in enumerate(step.inputs):
            other = self.steps.get(link.id)
            if other is None:  # a source has its bytes
                continue
            if artifact is None:
                self._need(other)
                continue
            reads = step.node.target.role(link.use.role).reads
            for name, maker in other.makers.items():
                if name.startswith(reads or ("\0",)):
                    self._need_maker(maker, name, Taking(step.key or step.id, i), step)

    def _need_maker(self, identifier: str, component: str, taking: Taking, taker: Step | None) -> None:
        """Note who takes the bytes of a component, and need the step that makes it."""
        if maker := self.steps.get(identifier):
            self._takers.setdefault(maker.key, {}).setdefault(component, {})[taking] = taker
            self._need(maker)

    def _join_passes(self) -> None:
        """Compute formulas whose bytes only one other formula takes in that one's pass: nothing of them is written."""
        for step in reversed(self.steps.values()):  # takers first
            if root := self._only_pass(step):
                step.state, step.within = "unneeded", root.id

    def _only_pass(self, step: Step) -> Step | None:
        """Return the step in whose pass a formula can be computed: all that is taken of it, once each, is taken there.

        What is taken twice is kept instead of being computed twice.
        """
        if step.kind != "formula" or step.state != "build" or step.artifact is None or step.result:
            return None  # of a result whose bytes are lost the tensors are listed where they lay
        taken = self._takers[step.key].values()
        roots = {root.key: root for takers in taken for taker in takers.values() if (root := self._pass_of(taker))}
        once = all(len(takers) == 1 and self._pass_of(*takers.values()) for takers in taken)
        return next(iter(roots.values())) if once and len(roots) == 1 else None

    def _pass_of(self, taker: Step | None) -> Step | None:
        """Return the step in whose pass a taker computes, or None if it is no formula that has to run."""
        if taker is None or taker.kind != "formula":
            return None
        if taker.within:
            return self.steps[taker.within]
        return taker if taker.state in ("build", "maybe") else None

    def _how(self, step: Step) -> str:
        """Say whether a step that is needed must run, or may turn out not to."""
        if step.pin and not step.result and step.id not in self.wishes.retrain:
            if self.view.offered(step.pin):
                return "fetch"
            step.reason = "the pinned result is not to be had"
            return "build"
        waiting = any(artifact is None for _, artifact in step.inputs) or (
            step.kind == "content" and not step.content_key
        )
        return "maybe" if waiting and self._seen_alike(step) else "build"

    def _seen_alike(self, step: Step) -> bool:
        """Say whether store or lock hold a result whose manifest is equal apart from the identities of its inputs."""
        if step.id in self.wishes.retrain:
            return False
        if self.view.known(likeness(step)).alias:
            return True
        target = step.node.target
        settings = json.loads(target.settings) | ({"seed": target.seed} if target.seed is not None else {})
        wanted = (target.signature.name, target.signature.version, canonical(settings))
        pins = (pin for found in self.lock.results.values() for pin in found.values())
        return any((pin.method, pin.method_version, canonical(pin.settings)) == wanted for pin in pins)
