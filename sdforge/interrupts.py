"""Signals that end a command: what is half written is taken away first.

While a build runs the first SIGINT or SIGTERM is noted, for the loop to end in order; the second ends all.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def raised(*numbers: int) -> Iterator[list[int]]:
    """Let signals end what runs meanwhile as Ctrl-C does; yield those that have come.

    Raises KeyboardInterrupt for SIGINT and SystemExit for others; what a library makes of it may be another error.
    Signals that are ignored, as SIGHUP under `nohup`, stay so; in a thread that is not the main one none arrive.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 -- what signal handlers get
        came.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: handler for number in numbers if (handler := signal.getsignal(number)) in usual}
    for number in before:
        signal.signal(number, end)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
