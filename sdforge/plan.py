"""What has to be done, in what order, and why: the steps of a plan, as values. `planner` finds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from sdforge.artifact import Artifact, Component, Tensor
from sdforge.graph import Link, Node
from sdforge.lock import Pin
from sdforge.store.entries import Known, Result


@dataclass(eq=False)
class Step:
    """A target as the plan sees it: one action, or a mere moving of components.

    manifest, key: over the identities of its inputs; "" while an input is not known yet.
    content_manifest, content_key: over their bytes; "" while those are not known.
    artifact: what it is, as far as can be told; result: what the store has of it; pin: what the lock wants.
    state: `reuse`, `fetch`, `build`, `maybe` (behind one that must run first, and something alike was made before),
    `unneeded`; while it runs, `running`.
    makers: component → id of the step that made it (a source's id for what passes from there).
    lineage: the name of how it came to be, all the way from the sources; files that embed it depend on it.
    """

    node: Node
    inputs: tuple[tuple[Link, Artifact | None], ...] = ()
    manifest: str = ""
    key: str = ""
    content_manifest: str = ""
    content_key: str = ""
    artifact: Artifact | None = None
    result: Result | None = None
    pin: Pin | None = None
    state: str = "unneeded"
    reason: str = ""
    lineage: str = ""
    makers: dict[str, str] = field(default_factory=dict)
    differs: bool = False  # from the pin
    idle: bool = False  # nothing is computed: a formula that changes nothing here, or a swap
    restore: bool = False  # the result is known, the files in `out/` are not whole
    within: str = ""  # id of the step in whose pass it is computed, where nobody else needs its bytes
    checks: tuple[Step, ...] = ()  # that have to pass before its files are written
    unchecked: bool = False  # it has checks, and was asked for without them
    barred: bool = False  # a check whose command may not run on this machine

    @property
    def id(self) -> str:
        return self.node.id

    @property
    def kind(self) -> str:
        return self.node.target.signature.kind

    @property
    def passes(self) -> bool:
        """Whether what it takes goes on as it is, as through a cast to the type that all of it has already."""
        return self.idle and self.kind != "moves"

    @property
    def listed(self) -> bool:
        """Whether people are told of it: of what a preset adds by itself only what computes something."""
        return not self.idle or not self.node.target.implicit

    @property
    def to_do(self) -> bool:
        return self.state in ("build", "maybe", "fetch")

    @property
    def passed(self) -> bool:
        """Whether a check passed (or none may be made here): until then what waits for it is not written."""
        return self.barred or (self.state == "reuse" and self.result is not None and not self.failed)

    @property
    def failed(self) -> bool:
        """Whether it is a check, and its verdict is known and bad."""
        return self.result is not None and self.result.kind == "verdict" and not self.result.facts["passed"]


@dataclass
class Plan:
    """The steps behind what is wanted, inputs first.

    notes: plan key → what a formula makes, to be remembered. aliases: (plan key, content key, manifest).
    """

    steps: dict[str, Step]
    wanted: list[str]
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    aliases: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def to_do(self) -> list[Step]:
        """The steps that must (or may have to) run, and those whose files must be written again."""
        return [step for step in self.steps.values() if step.to_do or step.restore]

    def before(self, identifier: str) -> str:
        """Return the id of the step, or source, whose result a step passes on as it is; of any other step its own."""
        while (step := self.steps.get(identifier)) is not None and step.passes:
            identifier = step.inputs[0][0].id
        return identifier


@dataclass(frozen=True)
class Wishes:
    """What a command asks of the plan.

    retrain: ids whose results are made again; locked: nothing may differ; checked: checks decide what is written.
    """

    retrain: frozenset[str] = frozenset()
    locked: bool = False
    checked: bool = True


class View(Protocol):
    """What planning asks of the store."""

    def known(self, key: str) -> Known: ...
    def table(self, component: Component) -> list[Tensor]: ...
    def vocabulary(self, component: Component) -> dict[str, Any]: ...
    def holds(self, result: Result) -> bool: ...
    def offered(self, pin: Pin) -> bool: ...
    def vouched(self, key: str) -> Pin | None: ...
    def looks(self, step: Step) -> dict[str, Any]: ...
    def permits(self, step: Step) -> bool: ...
