"""The commands that do more than plan: kept apart, so that a null build does not import them."""

from __future__ import annotations

import argparse
import json
import sys

from sdforge.build import Build, Options, Summary
from sdforge.errors import exit_code
from sdforge.executors.local import LocalExecutor
from sdforge.plan import Plan
from sdforge.report.progress import Plain, reporter
from sdforge.report.table import row
from sdforge.report.words import safe
from sdforge.session import Session


def build_for_real(session: Session, wanted: list[str], wishes: argparse.Namespace) -> int:
    """Run what must run; say what came of it; return the exit code."""
    run = session.project.run
    options = Options(
        jobs=wishes.jobs or run.get("jobs", 1),
        device=wishes.device or run.get("device", "auto"),
        keep_going=wishes.keep_going,
        wait=not wishes.no_wait,
        threads=run.get("threads", 1),
        states=run.get("states", {}),
    )
    view = reporter(sys.stdout, as_json=wishes.json, plain=wishes.plain)
    session.sources.progress = hashing(view) if isinstance(view, Plain) else session.sources.progress
    build = Build(session, LocalExecutor(options.threads), view, options)
    try:
        summary = build.run(wanted)
    finally:
        view.close()
    conclude(session, summary, as_json=wishes.json)
    return exit_code(list(summary.failed.values()))


def hashing(view: Plain) -> object:
    """Return a progress function for sources that are being read for the first time."""
    return lambda what, done, total: None


def conclude(session: Session, summary: Summary, *, as_json: bool) -> None:
    """Say what a build did."""
    plan = summary.plan
    assert plan is not None
    reused = [s for s in plan.steps.values() if s.state == "reuse" and s.id not in summary.built and not s.idle]
    counts = {"built": len(summary.built), "reused": len(reused), "failed": len(summary.failed),
              "skipped": len(summary.skipped)}  # fmt: skip
    if as_json:
        print(json.dumps({"v": 1, "event": "result", **counts}))
        return
    text = ", ".join(f"{n} {word}" for word, n in counts.items() if n)
    print(safe(f"  {text or 'nothing to do'}", sys.stdout))


def show_plan(session: Session, plan: Plan, *, as_json: bool) -> None:
    """Print the plan."""
    for step in plan.steps.values():
        print(row(step, step.reason))


