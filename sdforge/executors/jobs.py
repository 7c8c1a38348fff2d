"""What an engine of a cluster is to forge: it takes a folder with an order, and says whether its job is still there."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sdforge.errors import UsageError
from sdforge.executors import Resources
from sdforge.executors.local import ENVIRONMENT
from sdforge.run.spool import serve

LOST, CANCELLED, MEMORY, LIMITS = "lost", "cancelled", "memory", "limits"


class Ended(NamedTuple):
    """How a job ended without a word, as its engine calls it; or that it will never begin.

    why: LOST: it is begun again. For good: CANCELLED by somebody; it needed more MEMORY than it asked for; it asked for
    more than there is (LIMITS).
    """

    word: str
    why: str = LOST


class Job(Protocol):
    """A job of an engine. log: a file in which the engine keeps what it printed; "" if there is none."""

    log: str

    def ended(self) -> Ended | None:
        """Say how it ended, or None while its engine has it: waiting, running, or about to run again."""
        ...

    def stands(self) -> str:
        """Say how it stands while it is there, for people; "" if its engine does not tell."""
        ...

    def cancel(self) -> None:
        """End it."""
        ...


class Launcher(Protocol):
    """An engine."""

    def launch(self, folder: Path, resources: Resources) -> Job:
        """Have the order in a folder run by a job that asks for so much. Raises the engine's own errors."""
        ...


def run_folder(folder: str) -> None:
    """What a job does: run the order in a folder."""
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    serve(folder)


def library(name: str, extra: str) -> Any:
    """Return the library of an engine. Raises UsageError where it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        raise UsageError(f"--on needs the library {name}", hint=f'pip install "sdforge[{extra}]"') from None
