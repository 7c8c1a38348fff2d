"""One order from a folder that builder and runner both see: how an action runs on another machine.

    order.json     what to do                events.jsonl   what has happened, a line each; the last one is the end
    stop           asks to stop              builder        touched by the builder while it waits
    runner         a name of whoever runs it

There is no socket between the two, so what lies between them need not let connections through. An engine that has lost
sight of a node runs its jobs elsewhere, while they may go on there: whoever came before the runner that is named says
nothing more, and stops.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from sdforge.devices import devices
from sdforge.order import Order
from sdforge.run.__main__ import run_reporting
from sdforge.store.files import own_name, publish_bytes

ORDER, EVENTS, STOP, BUILDER, RUNNER = "order.json", "events.jsonl", "stop", "builder", "runner"
LOG = "log.txt"  # what it prints
GONE = 120.0  # seconds without a touch after which the builder counts as gone


class Spool:
    """The runner's side of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, own_name()
        self.touched, self.seen = 0, time.monotonic()
        publish_bytes(self.name.encode(), folder / RUNNER, folder, 0o644)

    def replaced(self) -> bool:
        """Say whether the order was given to somebody else meanwhile, or the folder is gone."""
        try:
            return (self.folder / RUNNER).read_text() != self.name
        except OSError:
            return True

    def say(self, event: dict[str, Any]) -> None:
        """Append an event, whole; nothing where another one runs the order."""
        if self.replaced():
            return
        line = (json.dumps(event, separators=(",", ":")) + "\n").encode()
        fd = os.open(self.folder / EVENTS, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, line)
            os.fsync(fd)
        finally:
            os.close(fd)

    def stopped(self) -> bool:
        """Say whether to stop: asked to, replaced, or the builder is gone. Clocks of two machines are not compared."""
        if (self.folder / STOP).exists() or self.replaced():
            return True
        try:
            touched = (self.folder / BUILDER).stat().st_mtime_ns
        except OSError:
            return True  # the folder is gone, and the builder with it
        if touched != self.touched:
            self.touched, self.seen = touched, time.monotonic()
        return time.monotonic() - self.seen > GONE


def serve(folder: str) -> None:
    """Run the order in a folder, in this process."""
    spool = Spool(Path(folder))
    order = Order.from_json(json.loads((spool.folder / ORDER).read_bytes()))
    order.how["device"] = devices(order.how.get("device", "auto"))[0]
    said = 0.0

    def report(**event: Any) -> None:
        nonlocal said
        if "step" not in event or time.monotonic() - said > 1 or event["step"] == event.get("steps"):
            said = time.monotonic()
            spool.say({"event": "progress", **event})

    log_file = spool.folder / LOG
    spool.say({"event": "progress", "remark": f"{order.how['device']} of {platform.node()} computes; log: {log_file}"})
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    before = os.dup(1), os.dup(2)
    _flush()
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        end = run_reporting(order, report, spool.stopped)
        _flush()
        spool.say(end)
    finally:
        _flush()
        for number, fd in enumerate(before, start=1):
            os.dup2(fd, number)
            os.close(fd)
        os.close(log)


def _flush() -> None:
    """Let what was printed come to where it is printed to, and what will be line by line: the builder shows it."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        if isinstance(stream, TextIOWrapper):  # an engine may have put one of its own there
            stream.reconfigure(line_buffering=True)
