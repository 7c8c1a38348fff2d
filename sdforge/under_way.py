"""A build under way, as values: how it is done, what runs, what has been done, and who is told of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sdforge.errors import ForgeError
from sdforge.executors import Cluster, Handle, Resources
from sdforge.one_pass import Pass
from sdforge.plan import Plan, Step
from sdforge.store.entries import Result
from sdforge.store.files import Lock


class Reporter(Protocol):
    """Who tells a person (or a program) how it goes."""

    def planned(self, plan: Plan) -> None: ...
    def started(self, step: Step, device: str) -> None: ...
    def progress(self, step: Step, event: dict[str, Any]) -> None: ...
    def waiting(self, step: Step, holder: str) -> None: ...
    def finished(self, step: Step, result: Result | None, seconds: float) -> None: ...
    def failed(self, step: Step, error: ForgeError) -> None: ...
    def wrote(self, step: Step, paths: list[str], moved: list[str], files: list[dict[str, Any]]) -> None: ...
    def drawn(self, path: str, moved: list[str]) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass
class Options:
    """How to build. jobs: actions side by side on this machine; device: `auto`, `cpu`, `cuda`, `cuda:N`.

    how: what runners are told beside it: `states`, `samples`, `vram` (bytes), `tensorboard`.
    cluster: where actions run as jobs, jobs_elsewhere of them side by side; None: all run on this machine.
    """

    jobs: int = 1
    cluster: Cluster | None = None
    jobs_elsewhere: int = 1
    device: str = "auto"
    keep_going: bool = False
    wait: bool = True
    threads: int = 1
    how: dict[str, Any] = field(default_factory=dict)


@dataclass
class Running:
    """An action at work. key: the one that is locked; formula: what a formula's result will hold.

    resources: of the job as which it runs; None: it runs on this machine.
    """

    step: Step
    handle: Handle
    lock: Lock
    device: Lock | None
    work: Path
    key: str
    manifest: str
    began: float
    formula: Pass | None = None
    resources: Resources | None = None


@dataclass
class Summary:
    """What a build did, by the ids of the targets."""

    built: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)  # whose files were written again
    fetched: list[str] = field(default_factory=list)
    failed: dict[str, ForgeError] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    pinned: set[str] = field(default_factory=set)  # content keys that had a pin before
    plan: Plan | None = None

    @property
    def done(self) -> dict[str, list[str]]:
        """What was done → ids."""
        return {"built": self.built, "fetched": self.fetched, "restored": self.restored}
