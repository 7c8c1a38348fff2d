"""Backwards through a plan: whose bytes are needed, and so what has to run.

A formula whose bytes nobody takes but one other formula is computed within that one's pass, and kept nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

from sdforge.identity import canonical
from sdforge.lock import Lock
from sdforge.manifest import likeness
from sdforge.plan import Step, View, Wishes

MOST_NESTED = 64  # formulas within one pass, one in the other: orders are written and read level by level


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
        self._nested: dict[str, int] = {}  # id → how many formulas lie between a step and the end of its pass

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
                self._need(*self._inputs(step))
            return
        if makes == "verdict":
            self._want_verdict(step)
            return
        if step.artifact is None:
            self._need(step)
            return
        for name, maker in step.makers.items():
            self._need(*self._maker(maker, name, Taking(""), None))
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
            self._need(*self._inputs(step))

    def _need(self, *steps: Step) -> None:
        """Mark steps whose bytes are needed, and all that they need: without recursion, as chains may be long."""
        pending = list(steps)
        while pending:
            step = pending.pop()
            if step.state != "unneeded":
                continue
            if step.result and self.view.holds(step.result):
                step.state = "reuse"
                continue
            step.state = "reuse" if step.idle else self._how(step)
            if step.state != "fetch":
                pending += self._inputs(step)

    def _inputs(self, step: Step) -> Iterator[Step]:
        """Yield the steps that make what a step reads; it is noted among those who take their bytes."""
        for i, (link, artifact) in enumerate(step.inputs):
            other = self.steps.get(link.id)
            if other is None:  # a source has its bytes
                continue
            if artifact is None:
                yield other
                continue
            reads = step.node.target.role(link.use.role).reads
            for name, maker in other.makers.items():
                if name.startswith(reads or ("\0",)):
                    yield from self._maker(maker, name, Taking(step.key or step.id, i), step)

    def _maker(self, identifier: str, component: str, taking: Taking, taker: Step | None) -> Iterator[Step]:
        """Yield the step that makes a component, unless it is a source, and note who takes its bytes."""
        if maker := self.steps.get(identifier):
            self._takers.setdefault(maker.key, {}).setdefault(component, {})[taking] = taker
            yield maker

    def _join_passes(self) -> None:
        """Compute formulas whose bytes only one other formula takes in that one's pass: nothing of them is written."""
        for step in reversed(self.steps.values()):  # takers first
            if root := self._only_pass(step):
                step.state, step.within = "unneeded", root.id
                self._nested[step.id] = self._depth(step)

    def _only_pass(self, step: Step) -> Step | None:
        """Return the step in whose pass a formula can be computed: all that is taken of it, once each, is taken there.

        What is taken twice is kept instead of being computed twice, and so is what would lie too deep.
        """
        if step.kind != "formula" or step.state != "build" or step.artifact is None or step.result:
            return None  # of a result whose bytes are lost the tensors are listed where they lay
        taken = self._takers[step.key].values()
        roots = {root.key: root for takers in taken for taker in takers.values() if (root := self._pass_of(taker))}
        once = all(len(takers) == 1 and self._pass_of(*takers.values()) for takers in taken)
        fits = once and len(roots) == 1 and self._depth(step) <= MOST_NESTED
        return next(iter(roots.values())) if fits else None

    def _depth(self, step: Step) -> int:
        """Return how deep a formula would lie in the pass of those that take its bytes."""
        takers = [taker for takers in self._takers[step.key].values() for taker in takers.values()]
        return 1 + max((self._nested.get(taker.id, 0) for taker in takers if taker), default=0)

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
