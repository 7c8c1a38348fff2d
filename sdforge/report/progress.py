"""Reporters of a build: plain lines, a live view on a terminal, JSON Lines for programs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any, TextIO

from sdforge.errors import ActionFailed, CheckFailed, ForgeError
from sdforge.explain import Explainer
from sdforge.plan import Plan, Step
from sdforge.report.words import glyphs, safe, seconds, size
from sdforge.session import Session
from sdforge.store.entries import Result
from sdforge.variants import MARK, split

EVERY = 2.0  # seconds between plain progress lines


NAMES = 18  # letters of the column of targets, at least


def short(step: Step) -> str:
    """Return a target's name as it is shown: without its recipe, which is clear, but with the variant (`@NAME:`)."""
    recipe, _, name = step.id.partition(":")
    variant = split(recipe)[1]
    return f"{MARK}{variant}:{name}" if variant else name


def names(plan: Plan) -> dict[str, str]:
    """Return id → how the steps of a plan are called in what is said of it.

    The recipe is left out where it is clear: of what belongs to the only one that is wanted.
    """
    homes = {split(identifier.partition(":")[0])[0] for identifier in plan.wanted}
    return {i: short(step) if {step.node.recipe.home} == homes else i for i, step in plan.steps.items()}


def width_of(called: Iterable[str]) -> int:
    """Return how wide a column is that holds these names."""
    return max(NAMES, *(len(name) for name in called), 0)


def shown_digest(step: Step, result: Result | None) -> str:
    """Return the digest by which people know what a step made: the one that the lock holds.

    A merge makes some components, and others pass: its digest is that of the whole checkpoint, as a swap's is.
    """
    whole = step.artifact.digest if step.artifact is not None and step.kind in ("formula", "moves") else ""
    return whole or (result.digest if result else "")


class Plain:
    """One line per event, no cursor moves."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.signs = glyphs(stream)
        self.names: dict[str, str] = {}
        self.width = NAMES
        self._last: dict[str, float] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._seen: set[str] = set()

    def name(self, step: Step) -> str:
        """Return how a step is called here."""
        return self.names.get(step.id, step.id)

    def line(self, text: str) -> None:
        print(safe(text, self.stream), file=self.stream, flush=True)

    def planned(self, plan: Plan) -> None:
        self.names = names(plan)
        self.width = width_of(self.names[step.id] for step in plan.steps.values() if step.listed)
        for step in plan.steps.values():
            if step.state == "reuse" and not step.restore and step.listed:
                self.line(f"  {self.signs['reuse']} {self.head(step)} reused")

    def started(self, step: Step, device: str) -> None:
        where = f" on {device}" if _computes(step) else ""
        if device == "remote":
            self.line(f"  {self.signs['fetch']} {self.head(step)} fetching the pinned result")
            return
        verb = "restoring" if step.restore else "running"
        self.line(f"  {self.signs['build']} {self.head(step)} {verb}{where}")

    def progress(self, step: Step, event: dict[str, Any]) -> None:
        if "resumed" in event:
            same = "" if event["same"] else ", begun on another machine or version"
            self.line(f"    {self.name(step)}: going on from {_unit(step)} {event['resumed']}{same}")
        if "derived" in event:
            self.line(f"    {self.name(step)}: {self.caches(event)}")
        if "fits" in event:
            self.line(f"    {self.name(step)}: {event['note']}")
        if "remark" in event:
            self.line(f"    {self.name(step)}: {event['remark']}")
        if "log" in event:
            self.line(f"    {self.name(step)} | {event['log']}")
        if "validation" in event:
            self.line(f"    {self.name(step)}: validation loss {event['validation']:.4f} at step {event['at']}")
        if "step" not in event:
            return
        now = time.monotonic()
        if step.id not in self._began:
            self._began[step.id] = (now, event["step"])
        if event["step"] < event["steps"] and now - self._last.get(step.id, 0) < EVERY:
            return
        self._last[step.id] = now
        self.line(f"    {self.name(step)}: {self.pace(step, event)}")

    @staticmethod
    def caches(event: dict[str, Any]) -> str:
        """Say what was encoded and what was there already."""
        made, reused = event["derived"]["made"], event["derived"]["reused"]
        parts = [
            f"{what}: {made.get(what, 0)} encoded, {reused.get(what, 0)} reused" for what in sorted({*made, *reused})
        ]
        return "; ".join(parts) or "nothing to encode"

    def pace(self, step: Step, event: dict[str, Any]) -> str:
        """Say how far an action is: step N/M (or tensor, picture, …), loss, steps a second, time left."""
        began, first = self._began.get(step.id, (time.monotonic(), 0))
        done, spent = event["step"] - first, time.monotonic() - began
        unit = _unit(step)
        text = f"{unit} {event['step']}/{event['steps']}"
        if "loss" in event:
            text += f"  loss {event['loss']:.4f}"
        if done > 0 and spent > 0.5:
            rate = done / spent
            text += f"  {rate:.1f} {unit}s/s  {seconds((event['steps'] - event['step']) / rate)} left"
        return text

    def waiting(self, step: Step, holder: str) -> None:
        self.line(
            f"    {self.name(step)}: waiting for process {holder}"
            if holder.isdigit()
            else f"    {self.name(step)}: waiting for {holder}"
        )

    def finished(self, step: Step, result: Result | None, spent: float) -> None:
        self.line("  " + self.ending(step, result, spent))
        for text, hint in result.record.get("warnings", []) if result else []:
            self.line(f"  {self.signs['warning']} {text}")
            self.line(f"      try   {hint}")

    def ending(self, step: Step, result: Result | None, spent: float) -> str:
        """Say what came out of an action."""
        if result and result.kind == "verdict":
            return f"{self.signs['reuse']} {self.head(step)} passed   {result.facts['says']}".rstrip()
        loss = f"  loss {result.record['loss']:.4f}" if result and "loss" in result.record else ""
        name = shown_digest(step, result)[:8]
        done = "restored" if step.restore else "fetched" if step.state == "fetch" else "built"
        return f"{self.signs['reuse']} {self.head(step)} {done:<8} {name}  {seconds(spent)}{loss}"

    def head(self, step: Step) -> str:
        """Return a target and its method, in columns."""
        return f"{self.name(step):<{self.width}} {step.node.target.signature.name:<18}"

    def failed(self, step: Step, error: ForgeError) -> None:
        self.line(f"  {self.signs['failed']} {self.head(step)} {error.message}")
        if error.hint and not isinstance(error, CheckFailed):  # of those it is said once, at the end
            self.line(f"      try   {error.hint}")
        if isinstance(error, ActionFailed) and error.log:
            self.line(f"      log   {error.log}")

    def wrote(self, step: Step, paths: list[str], moved: list[str], files: list[dict[str, Any]]) -> None:
        for name in moved:
            self.line(f"  {self.signs['warning']} what lay in the way was not ours: it is in {name} now")
        if step.node.target.signature.makes == "files":
            self.line(f"    out/{step.node.recipe.name}/: {', '.join(_folded(paths))}")
            for file in files:
                if "autov2" in file and "/" not in file["path"].removeprefix("loras/"):
                    self.line(f"    {file['path']}")
                    self.line(f"      SHA256 {file['sha256']}")
                    self.line(f"      AutoV2 {file['autov2']}  AutoV3 {file['autov3']}")
        else:
            self.line(f"    out/{step.node.recipe.name}/previews/sheet.png and {len(paths) - 1} pictures")

    def drawn(self, path: str, moved: list[str]) -> None:
        """Say that a grid lies in `out/`."""
        for name in moved:
            self.line(f"  {self.signs['warning']} what lay in the way was not ours: it is in {name} now")
        self.line(f"    {path}")

    def note(self, text: str) -> None:
        self.line(f"  {text}")

    def close(self) -> None:
        """End the view."""


def _computes(step: Step) -> bool:
    """Say whether a device is at work in an action."""
    return step.kind == "content" and step.node.target.signature.makes not in ("files", "verdict")


def _unit(step: Step) -> str:
    """Return what is counted while an action runs."""
    signature = step.node.target.signature
    if signature.makes in ("pictures", "dataset"):
        return "picture"
    return "step" if signature.group == "trainings" else "tensor" if step.kind == "formula" else "part"


def _folded(paths: list[str]) -> list[str]:
    """Name folders of many files once."""
    return list(dict.fromkeys(f"{p.split('/')[0]}/" if "/" in p and p.startswith("diffusers/") else p for p in paths))


class Live(Plain):
    """The same on a terminal, with one moving line for each running action."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        # names and messages are shown as they are: `words:cat:` is no picture of a cat, and `[run]` no colour
        self.console = Console(file=stream, highlight=False, soft_wrap=True, emoji=False)
        self.view = Progress(
            TextColumn("  {task.fields[sign]} {task.fields[name]}", markup=False),
            BarColumn(24),
            TextColumn("{task.fields[text]}", markup=False),
            console=self.console,
            transient=True,
        )
        self._tasks: dict[str, Any] = {}
        self.view.start()

    def line(self, text: str) -> None:
        style = "red" if self.signs["failed"] in text[:6] else "green" if self.signs["reuse"] in text[:6] else None
        self.console.print(safe(text, self.stream), style=style, markup=False)

    def started(self, step: Step, device: str) -> None:
        text = f"{step.node.target.signature.name}{f' on {device}' if _computes(step) else ''}"
        name = f"{self.name(step):<{self.width}}"
        self._tasks[step.id] = self.view.add_task("", total=None, sign=self.signs["build"], name=name, text=text)

    def progress(self, step: Step, event: dict[str, Any]) -> None:
        task = self._tasks.get(step.id)
        if "note" in event and task is not None:
            self.view.update(task, text=safe(event["note"], self.stream))
        if "bytes" in event and task is not None:
            done, total = event["bytes"]
            self.view.update(task, total=total, completed=done, text=f"fetching, {size(total)}")
            return
        if "step" in event and task is not None:
            if step.id not in self._began:
                self._began[step.id] = (time.monotonic(), event["step"])
            self.view.update(task, total=event["steps"], completed=event["step"], text=self.pace(step, event))
        elif "step" not in event:
            super().progress(step, event)

    def finished(self, step: Step, result: Result | None, spent: float) -> None:
        self._drop(step)
        super().finished(step, result, spent)

    def failed(self, step: Step, error: ForgeError) -> None:
        self._drop(step)
        super().failed(step, error)

    def _drop(self, step: Step) -> None:
        task = self._tasks.pop(step.id, None)
        if task is not None:
            self.view.remove_task(task)

    def close(self) -> None:
        self.view.stop()


class JsonLines:
    """Events as JSON Lines; unknown fields may be added, `v` changes when one is removed."""

    def __init__(self, stream: TextIO, session: Session) -> None:
        self.stream, self.session = stream, session

    def say(self, event: str, of: Step | None = None, /, **fields: Any) -> None:
        message: dict[str, Any] = {"v": 1, "event": event}
        if of is not None:
            message |= {
                "target": of.id,
                "method": of.node.target.signature.name,
                "key": of.content_key or of.key,
            }
        print(json.dumps(message | fields), file=self.stream, flush=True)

    def planned(self, plan: Plan) -> None:
        explainer = Explainer(self.session, plan)
        for step in plan.steps.values():
            reason = [cause.text for cause in explainer.causes(step)] if step.to_do else []
            self.say("action", step, state=step.state, reason=reason, restore=step.restore, differs=step.differs)

    def started(self, step: Step, device: str) -> None:
        self.say("action", step, state="running", device=device, reason=[])

    def progress(self, step: Step, event: dict[str, Any]) -> None:
        self.say("progress", step, **{k: v for k, v in event.items() if k != "event"})

    def waiting(self, step: Step, holder: str) -> None:
        self.say("action", step, state="waiting", holder=holder, reason=[])

    def finished(self, step: Step, result: Result | None, spent: float) -> None:
        digest = shown_digest(step, result)
        seconds_spent = round(spent, 3)
        state = "fetched" if step.state == "fetch" else "built"
        told = result.record.get("warnings", []) if result else []
        more: dict[str, Any] = {"warnings": [{"message": text, "hint": hint} for text, hint in told]} if told else {}
        more |= {"says": result.facts["says"]} if result and result.kind == "verdict" else {}
        self.say(
            "action", step, state=state, restore=step.restore, digest=digest, seconds=seconds_spent, reason=[], **more
        )

    def failed(self, step: Step, error: ForgeError) -> None:
        self.say("action", step, state="failed", reason=[error.message], hint=error.hint)

    def wrote(self, step: Step, paths: list[str], moved: list[str], files: list[dict[str, Any]]) -> None:
        self.say("result", step, files=paths, moved=moved, hashes=[file for file in files if "autov2" in file])

    def drawn(self, path: str, moved: list[str]) -> None:
        self.say("grid", file=path, moved=moved)

    def note(self, text: str) -> None:
        self.say("note", text=text)

    def close(self) -> None:
        """End the stream."""


def reporter(stream: TextIO, session: Session, *, as_json: bool, plain: bool) -> Plain | JsonLines:
    """Choose how to tell: JSON where asked for, a live view on a terminal, plain lines elsewhere."""
    if as_json:
        return JsonLines(stream, session)
    if plain or not stream.isatty():
        return Plain(stream)
    return Live(stream)
