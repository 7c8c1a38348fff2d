"""What a command takes: seconds, seconds of CPU, and memory of no file at most, of it and all its children."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TICK = 0.05  # seconds between looks at a process's memory
SHARE = 0.02  # of a processor's time for looks: the system walks through all pages for each, beside what is measured


class Cost(NamedTuple):
    """What a process and its children took: seconds, seconds of CPU, MB of anonymous memory at most."""

    wall: float
    cpu: float
    anonymous: float


def measured(command: list[str], folder: Path, *, most: float = 0, tick: float = TICK, share: float = SHARE) -> Cost:
    """Run a command and say what it took. Raises CalledProcessError.

    most: MB of anonymous memory beyond which it is killed, before the machine has none left; 0: any.
    tick: seconds between looks at its memory, as long as they take no more than `share` of a processor's time.
    """
    began = time.monotonic()
    log = folder / "log.txt"
    with log.open("w+b") as output:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=environment)
        with _watched(process.pid, most, tick, share) as peak:
            _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    text = log.read_text(errors="replace")
    log.unlink()
    if process.returncode:
        if most and peak[0] > most:
            text = f"killed with {peak[0]:.0f} MB of anonymous memory"
        raise subprocess.CalledProcessError(process.returncode, command, stderr=text)
    return Cost(wall, usage.ru_utime + usage.ru_stime, peak[0])


@contextmanager
def _watched(pid: int, most: float, tick: float, share: float) -> Iterator[list[float]]:
    """Note the anonymous memory of a process and all its children, in MB, until the end; kill those beyond `most`."""
    over, peak = threading.Event(), [0.0]

    def watch() -> None:
        pause = tick
        while not over.wait(pause):
            began, members = time.thread_time(), _family(pid)
            peak[0] = max(peak[0], sum(map(_anonymous, members)))
            pause = max(tick, (time.thread_time() - began) / share)
            if most and peak[0] > most:
                for member in members:
                    with suppress(ProcessLookupError):
                        os.kill(member, signal.SIGKILL)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(each for child in children for each in _family(int(child)))]


def _anonymous(pid: int) -> float:
    """Return a process's memory that belongs to no file, in MB; of what processes share its part."""
    try:
        found = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    lines = (line for line in found.splitlines() if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return sum(int(line.split()[1]) * 1024 / 1e6 for line in lines)
