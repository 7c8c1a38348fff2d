"""Planning and building from Python: what `sdforge.plan` and `sdforge.build` return, and how a notebook shows it.

Nothing is printed. Failures are raised: the exceptions of `sdforge.errors`, with message, hint and exit code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sdforge.advice import note_warnings, refuse_mistakes
from sdforge.build import Build
from sdforge.commands import how_to_run
from sdforge.errors import ForgeError, LostObject, exit_code
from sdforge.executors.local import LocalExecutor
from sdforge.explain import Explainer, in_short
from sdforge.outputs import verdicts
from sdforge.plan import Plan, Step
from sdforge.report.cells import plan_html, preset_html
from sdforge.report.cost import total
from sdforge.report.progress import shown_digest
from sdforge.room import room
from sdforge.session import Session, open_session
from sdforge.store.entries import Result
from sdforge.under_way import Options, Summary


class Target(NamedTuple):
    """A row of a plan. name: RECIPE:NAME; reason: why.

    state: reuse, fetch, build, maybe, unneeded or restore, and of a check whose verdict is known and bad, failed.
    """

    name: str
    method: str
    state: str
    digest: str
    reason: str


@dataclass(frozen=True)
class Planned:
    """What a build would do. bytes: that it would write; seconds: that it would take, from what similar actions took.

    complete: whether all actions have run here before, so that the seconds are those of all of them.
    """

    targets: tuple[Target, ...]
    bytes: int
    seconds: float
    complete: bool

    @property
    def to_do(self) -> tuple[Target, ...]:
        """The targets that would be made, fetched or written again."""
        return tuple(target for target in self.targets if target.state in ("build", "maybe", "fetch", "restore"))

    def __repr__(self) -> str:
        return f"<plan: {len(self.to_do)} of {len(self.targets)} targets to do>"

    def _repr_html_(self) -> str:
        return plan_html(self.targets)


@dataclass(frozen=True)
class Built:
    """What a build did. built, fetched, restored: names of targets; folders: of the presets, with all their files.

    pictures: the previews, in the order of prompts and seeds; checks: as `preset.json` has them, by recipe.
    """

    targets: tuple[Target, ...]
    built: tuple[str, ...]
    fetched: tuple[str, ...]
    restored: tuple[str, ...]
    folders: tuple[Path, ...]
    pictures: tuple[Path, ...]
    checks: dict[str, dict[str, Any]]

    def __repr__(self) -> str:
        done = len(self.built) + len(self.fetched) + len(self.restored)
        return f"<build: {done} of {len(self.targets)} targets made, the others reused>"

    def _repr_html_(self) -> str:
        return plan_html(self.targets) + "".join(preset_html(folder) for folder in self.folders)


class Progress(NamedTuple):
    """What happens in a build. state: running, progress, waiting, built, failed or note; loss: of a training's step."""

    target: str
    state: str
    step: int = 0
    steps: int = 0
    loss: float | None = None
    text: str = ""


def plan(recipe: str | Sequence[str], project: str | Path, *, locked: bool, checks: bool) -> Planned:
    """See `sdforge.plan`."""
    session = open_session(Path(project))
    try:
        session.locked, session.checked = locked, checks
        session.share()
        made = session.plan(session.resolve(_names(recipe)))
        refuse_mistakes(session, made)
        needed, _ = room(session, made)
        spent, complete = total(session, made)
        return Planned(_targets(session, made), needed, spent, complete)
    finally:
        session.store.close()


def build(
    recipe: str | Sequence[str],
    project: str | Path,
    progress: Callable[[Progress], None] | None,
    wishes: dict[str, Any],
) -> Built:
    """See `sdforge.build`; wishes: its other arguments."""
    lost: set[str] = set()
    while True:
        session = open_session(Path(project))
        try:
            return _build(session, _names(recipe), _Telling(progress), wishes)
        except LostObject as error:  # what is damaged has been set aside: all is planned without it, once for each
            if error.sha256 in lost:
                raise
            lost.add(error.sha256)
            session.do_without(error)
        finally:
            session.store.close()


def _build(session: Session, names: list[str], telling: _Telling, wishes: dict[str, Any]) -> Built:
    session.locked, session.checked, session.trusting = wishes["locked"], wishes["checks"], wishes["allow_commands"]
    session.share()
    run = session.project.run
    options = Options(
        jobs=wishes["jobs"] or run.get("jobs", 1),
        device=wishes["device"] or run.get("device", "auto"),
        threads=run.get("threads", 1),
        how=how_to_run(run, ""),
    )
    wanted = session.resolve(names)
    session.want_again(list(wishes["retrain"]))
    made = session.plan(wanted)
    refuse_mistakes(session, made)
    note_warnings(session, made, telling.note)
    summary = Build(session, LocalExecutor(options.threads), telling, options).run(wanted)
    if summary.failed:
        raise _worst(summary)
    assert summary.plan is not None
    return _built(session, summary, summary.plan)


def _names(recipe: str | Sequence[str]) -> list[str]:
    return [recipe] if isinstance(recipe, str) else list(recipe)


def _worst(summary: Summary) -> ForgeError:
    """Return the failure that decides the exit code."""
    errors = list(summary.failed.values())
    return next(error for error in errors if exit_code([error]) == exit_code(errors))


def _built(session: Session, summary: Summary, made: Plan) -> Built:
    exports = [made.steps[i] for i in made.wanted if made.steps[i].node.target.signature.makes == "files"]
    drawn = [made.steps[i] for i in made.wanted if made.steps[i].node.target.signature.makes == "pictures"]
    return Built(
        _targets(session, made),
        tuple(summary.built),
        tuple(summary.fetched),
        tuple(summary.restored),
        tuple(session.outputs.folder(step) for step in exports),
        tuple(sorted(path for step in drawn for path in _pictures(session, step))),
        {step.node.recipe.name: verdicts(step) for step in exports},
    )


def _pictures(session: Session, step: Step) -> list[Path]:
    return [session.outputs.folder(step) / name for name in session.outputs.names(step).values()]


def _targets(session: Session, made: Plan) -> tuple[Target, ...]:
    explainer = Explainer(session, made)
    return tuple(
        Target(
            step.id,
            step.node.target.signature.name,
            "failed" if step.failed else "restore" if step.restore else step.state,
            shown_digest(step, step.result),
            step.reason or (in_short(explainer.causes(step)) if step.to_do else ""),
        )
        for step in made.steps.values()
        if step.listed
    )


class _Telling:
    """Tells a callback, if there is one, how a build goes."""

    def __init__(self, tell: Callable[[Progress], None] | None) -> None:
        self.tell = tell or (lambda _: None)

    def planned(self, plan: Plan) -> None:
        """The plan is there for whoever asks."""

    def started(self, step: Step, device: str) -> None:
        self.tell(Progress(step.id, "running", text=device))

    def progress(self, step: Step, event: dict[str, Any]) -> None:
        told = str(event.get("note", event.get("remark", "")))
        self.tell(Progress(step.id, "progress", event.get("step", 0), event.get("steps", 0), event.get("loss"), told))

    def waiting(self, step: Step, holder: str) -> None:
        self.tell(Progress(step.id, "waiting", text=holder))

    def finished(self, step: Step, result: Result | None, seconds: float) -> None:  # noqa: ARG002
        self.tell(Progress(step.id, "built", text=shown_digest(step, result)))

    def failed(self, step: Step, error: ForgeError) -> None:
        self.tell(Progress(step.id, "failed", text=error.message))

    def wrote(self, step: Step, paths: list[str], moved: list[str], files: list[dict[str, Any]]) -> None:  # noqa: ARG002
        self._moved(step.id, moved)

    def drawn(self, path: str, moved: list[str]) -> None:
        self.note(f"grid: {path}")
        self._moved("", moved)

    def _moved(self, target: str, moved: list[str]) -> None:
        for name in moved:
            self.tell(Progress(target, "note", text=f"what lay in the way was not ours: it is in {name} now"))

    def note(self, text: str) -> None:
        self.tell(Progress("", "note", text=text))
