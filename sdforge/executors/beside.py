"""What goes on beside the build in a thread of its own, as a handle that can be waited for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class Beside:
    """Runs `work(say)` in a thread; what it says is polled. `work` ends with an event that is no progress."""

    def __init__(self, work: Callable[[Callable[[dict[str, Any]], None]], None]) -> None:
        self.events: list[dict[str, Any]] = []
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.thread = threading.Thread(target=work, args=(self._say,), daemon=True)
        self.thread.start()

    def _say(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        os.write(self.writer, b".")

    def fileno(self) -> int:
        return self.reader

    def poll(self) -> list[dict[str, Any]]:
        """Return what has happened since it was last asked."""
        with suppress(BlockingIOError):
            os.read(self.reader, 4096)
        events, self.events = self.events, []
        if events and events[-1]["event"] != "progress":
            self.thread.join()
            os.close(self.reader)
            os.close(self.writer)
        return events

    def stop(self) -> None:
        """Nothing, where what is made is whole or not there."""

    def kill(self) -> None:
        """Nothing: the thread ends with the process."""
