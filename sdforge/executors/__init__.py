"""Where an action runs: in a worker of this machine, or as a job of a cluster. Both take an order and give a handle.

A handle is polled for events (progress, done, failed, stopped, damaged) and can be asked to stop, or be killed.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from sdforge.errors import counted
from sdforge.order import Order
from sdforge.report.words import seconds, size


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
    """Runs orders on this machine."""

    def expect(self) -> None:
        """Make a runner ready for an order that comes soon."""
        ...

    def submit(self, order: Order, log: str, lock: int) -> Handle:
        """Start an action; `lock` is a descriptor that the runner holds while it works."""
        ...

    def close(self) -> None:
        """End idle runners."""
        ...


class Resources(NamedTuple):
    """What a job asks for. memory: bytes; 0: what the engine gives. minutes, partition: as Slurm has them."""

    gpus: int
    cpus: int
    memory: int
    minutes: int
    partition: str

    def __str__(self) -> str:
        parts = [counted(self.gpus, "GPU")] if self.gpus else []
        parts.append(counted(self.cpus, "CPU"))
        parts += [size(self.memory)] if self.memory else []
        parts.append(seconds(60 * self.minutes))
        return ", ".join([*parts, f"partition {self.partition}"] if self.partition else parts)


class Cluster(Protocol):
    """Machines on which orders run as jobs. name: what its engine is called."""

    name: str

    def submit(self, order: Order, resources: Resources) -> Handle:
        """Have an order run somewhere that has these resources for it."""
        ...
