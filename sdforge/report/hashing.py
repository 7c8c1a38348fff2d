"""Shows that a large source is being read or fetched, when that takes longer than a moment."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from sdforge.report.words import seconds, size

PATIENCE = 1.0  # seconds before anything is shown
EVERY = 10.0  # seconds between lines where there is no terminal


class Hashing:
    """Called with what is read, bytes done and bytes in all."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self._what, self._began, self._said = "", 0.0, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._began, self._said = what, now, now
        if now - self._began < PATIENCE:
            return
        terminal = self.stream.isatty()
        if terminal and done >= total:
            self.stream.write("\r\x1b[K")
        elif now - self._said > (0.1 if terminal else EVERY):
            self._said = now
            text = f"  {self.text(what, done, total, now - self._began)}"
            self.stream.write(f"\r{text}\x1b[K" if terminal else f"{text}\n")
        self.stream.flush()

    def text(self, what: str, done: int, total: int, spent: float) -> str:  # noqa: ARG002 -- a download says more
        """Say how far it is; spent: seconds since it began."""
        return f"reading {what}: {100 * done // max(1, total)} %"


class Fetching(Hashing):
    """The same of a download, with its speed and the time that is left."""

    def text(self, what: str, done: int, total: int, spent: float) -> str:
        speed = done / max(spent, 0.1)
        if not total:
            return f"fetching {what}: {size(done)}, {size(int(speed))}/s"
        left = seconds((total - done) / max(speed, 1))
        return f"fetching {what}: {100 * done // total} % of {size(total)}, {size(int(speed))}/s, {left} left"
