"""SIGINT and SIGTERM while a build runs: the first one is noted, for the loop to end in order; the second ends all."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """What signals have come. at_once: what the second one calls."""

    def __init__(self, at_once: Callable[[], None]) -> None:
        self.signals: list[int] = []
        self._at_once = at_once

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals for as long as this lasts; in a thread that is not the main one none arrive."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 -- what signal handlers get
            self.signals.append(number)
            if len(self.signals) > 1:
                self._at_once()

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
