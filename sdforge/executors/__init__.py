"""Where an action runs. An executor has one seam: `submit(order, device, lock) → handle`.

A handle is polled for events (progress, done, failed, stopped, damaged) and can be asked to stop, or be killed.
"""

from __future__ import annotations

from typing import Any, Protocol

from sdforge.order import Order


class Handle(Protocol):
    """A running action."""

    def poll(self) -> list[dict[str, Any]]:
        """Return what has happened since the last time; `{"event": "lost"}` when the runner died."""
        ...

    def stop(self) -> None:
        """Ask it to keep its state and stop at the next step."""
        ...

    def kill(self) -> None:
        """Stop it at once."""
        ...

    def fileno(self) -> int:
        """A descriptor that is readable when there is something to poll."""
        ...


class Executor(Protocol):
    """Runs orders. elsewhere: what the machines are called that trainings run on; "" for this one."""

    elsewhere: str

    def submit(self, order: Order, log: str, lock: int) -> Handle:
        """Start an action; `lock` is a descriptor that the runner holds while it works."""
        ...

    def close(self) -> None:
        """End idle runners."""
        ...
