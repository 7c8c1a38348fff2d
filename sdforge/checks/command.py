"""A command of the recipe's owner looks at the pictures, and says whether they are right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from tempfile import TemporaryFile
from typing import IO, Annotated, final

from pydantic import Field

from sdforge.checks import Drawn, verdict
from sdforge.errors import ActionFailed
from sdforge.order import Order, Outcome
from sdforge.settings import Positive, Table
from sdforge.target import PREVIEWS

VERSION = 1
MAKES = "verdict"
PINNED = False
BARE = True  # it needs no torch

NOT_RUN = (126, 127)  # how shells say that they could not run something
MOST_SAID = 200  # letters of its last line


@final
class Command(Table):
    """The command gets JSON on its standard input, and its exit code is the verdict: 0 passed, any other one failed.

    `{"v": 1, "pictures": [{"path": …, "prompt": …, "number": 1, "seed": 1}]}`; the last line that it prints is shown.
    It runs in the project's folder, `python` being the one that runs sdforge, and runs again when the pictures, the
    command or a file of the project that it names have changed.

    A recipe may come from a stranger, so a recipe alone never runs anything: the command runs where this machine's
    `forge.local.toml` lists the very same words under `[checks] commands`, or with `forge build --allow-commands`.
    Elsewhere the check is not run, the build says so, and so does `preset.json`.
    """

    pictures: Drawn = PREVIEWS
    command: list[Annotated[str, Field(min_length=1, max_length=1000)]] = Field(
        min_length=1, max_length=64, description="the program and its arguments; no shell reads them"
    )
    seconds: Positive = Field(60.0, le=86_400, description="after which it is ended, and the check could not be made")


TABLE = Command


def run(order: Order, report: Callable[..., None]) -> Outcome:  # noqa: ARG001 -- what runs answer
    """Run the command. Raises ActionFailed if it cannot be run, is killed, or takes too long: that is no verdict."""
    words, seconds = order.settings["command"], order.settings["seconds"]
    rows = order.the("pictures").pictures
    pictures = [{"path": path, "prompt": said, "number": n, "seed": seed} for path, _, said, n, seed in rows]
    # files, not pipes: what a command leaves running would hold those open
    with TemporaryFile() as told, TemporaryFile() as spoken:
        told.write(json.dumps({"v": 1, "pictures": pictures}).encode())
        told.seek(0)
        code = _exit_code(words, order.how["root"], seconds, told, spoken)
        spoken.seek(0)
        said = spoken.read().decode(errors="replace")
    print(said, end="")
    if code is None:
        raise ActionFailed(f"{words[0]} took more than {seconds:g} s", "`seconds` allows it more")
    if code < 0 or code in NOT_RUN:
        raise ActionFailed(f"{words[0]} gave no verdict: exit code {code}", "what it printed is in the log")
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")[:MOST_SAID]
    return verdict([last or f"exit code {code}"] if code else [], last, {"exit_code": code})


def _exit_code(words: list[str], root: str, seconds: float, told: IO[bytes], spoken: IO[bytes]) -> int | None:
    """Run a command, and end with it whatever it started; return its exit code, None where it took too long."""
    program = [sys.executable if words[0] == "python" else words[0], *words[1:]]
    try:
        # in a session of its own, which what it starts belongs to
        process = subprocess.Popen(program, cwd=root, stdin=told, stdout=spoken, start_new_session=True)
    except OSError as error:
        raise ActionFailed(f"{words[0]} cannot be run: {error.strerror}", "is it installed, and executable?") from None
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
