"""An action that runs in the process of the build, since it only moves bytes."""

from __future__ import annotations

from typing import Any

from sdforge.order import Order


class Inline:
    """An action that runs in this process, since it only moves bytes."""

    def __init__(self, order: Order | None) -> None:
        from sdforge.run.__main__ import run_reporting

        self.events: list[dict[str, Any]] = []
        if order is None:
            end: dict[str, Any] = {"event": "done", "outcome": {}}
        else:
            end = run_reporting(
                order, lambda **event: self.events.append({"event": "progress", **event}), lambda: False
            )
        self.events.append(end)

    def fileno(self) -> int:
        return -1

    def poll(self) -> list[dict[str, Any]]:
        events, self.events = self.events, []
        return events

    def stop(self) -> None:
        pass

    def kill(self) -> None:
        pass
