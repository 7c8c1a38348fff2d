"""How much of the promises P1–P16 holds: `python -m benchmarks.reliability --for 40m`.

Every promise has cases, numbered; each is a toy project to which something is done, and that must then be as if nothing
had been, or a batch of texts. Cases run in turn until the time is over or the goals are reached; what was found is kept
in a file, so that the next call goes on from there, and a table of all calls is printed. Needs Linux on x86-64 for
kills and errors at system calls, and root for cut power (a loop device with ext4) and full disks (tmpfs); what cannot
be had is said to be not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.reliability import faults, finite, pickles, sameness, shared, texts
from benchmarks.reliability.place import ROOT, Bench, Found
from tests import calls
from tests.merges.test_merge_vectors import CASES, DTYPES

SLICE = 8.0  # seconds for one promise before it is the next one's turn
Case = Callable[[Bench, int], Found | None]


@dataclass
class Tally:
    """What is known of one promise. runs: kind → how many were tried; problems: case → what was wrong."""

    runs: dict[str, int] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    mended: int = 0  # cases that were wrong once, and are not any more
    facts: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    at: int = 0  # the next case
    over: bool = False  # there are no more cases
    tried: list[str] = field(default_factory=list)  # cases of this call
    missing: str = ""  # why it cannot be measured here


@dataclass(frozen=True)
class Promise:
    """A row of `reference/reliability.md` §4. goal: how many have to be tried (0: all that there are).

    lacks: why it cannot be measured here; share: of a slice.
    """

    name: str
    about: str
    goal: int
    case: Case
    lacks: Callable[[], str] = lambda: ""
    share: float = 1.0

    def is_reached(self, tally: Tally) -> bool:
        return tally.over or 0 < self.goal <= sum(tally.runs.values())


def suite(*arguments: str) -> Case:
    """Let tests of the suite be the measurement."""

    def run(bench: Bench, i: int) -> Found | None:  # noqa: ARG001 -- every case's form
        if i:
            return None
        command = [sys.executable, "-m", "pytest", "-n", "0", "-rf", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        passed = re.search(r"(\d+) passed", done.stdout)
        failed = re.findall(r"^FAILED .*", done.stdout, re.M)
        return Found("tests", failed or ([] if passed else [done.stdout[-300:]]), int(passed[1]) if passed else 0)

    return run


def without_root() -> str:
    return "" if os.geteuid() == 0 and shutil.which("mkfs.ext4") else "needs root, and ext4 on a loop device"


PLANTED = finite.COMMANDS + sum(count for count, _ in CASES.values()) * len(DTYPES) * len(finite.BAD)
PROMISES = {
    "P1": Promise("kill -9", "500 system calls, 300 times, 100 chains, 100 signals", 1000, faults.kill, calls.lacks, 4),
    "P2": Promise("power loss", "200 cuts", 200, faults.power, without_root),
    "P3": Promise("I/O errors", "every call × {EIO, ENOSPC} × {once, always}", 0, faults.io_error, calls.lacks, 3),
    "P4": Promise("disk full", "36 sizes × 3 places", 108, faults.full_disk, without_root),
    "P5": Promise("corrupt cache", "1,000 damages", 1000, faults.damage),
    "P6": Promise("several at once", "200 rounds × 4 builds", 200, faults.concurrency),
    "P7": Promise("hostile recipes", "10⁶ mutants, 10⁴ by a command", 1_010_000, texts.recipes, share=2),
    "P8": Promise("hostile model files", "10⁷ mutants of headers", 10_000_000, texts.headers, share=2),
    "P9": Promise("pickles", "19 kinds of payload, none runs", 0, pickles.pickles),
    "P10": Promise("remotes", "26 faults", 0, shared.remote),
    "P11": Promise("class A", "19 surroundings (2 architectures are not to be had)", 19, sameness.surroundings),
    "P12": Promise("class B", "3 repeats, 20 resumes", 23, sameness.training, share=2),
    "P13": Promise("untrusted recipes", "0 sockets, programs, files outside", 0, suite("tests/build/test_outside.py")),
    "P14": Promise("secrets", "4 canaries, 0 hits", 0, suite("tests/build/test_outside.py", "-k", "secret")),
    "P15": Promise("numbers", "100 % of planted NaN, Inf and overflow stop", PLANTED, finite.planted),
    "P16": Promise("cost", "publish ≤ 20 ms", 500, sameness.costs, share=0.2),
}


def measure(bench: Bench, tallies: dict[str, Tally], until: float, only: list[str], keep: Callable[[], None]) -> None:
    """Run cases in turn until the time is over or all goals are reached."""
    for name, promise in PROMISES.items():
        tallies[name].missing = promise.lacks()

    def is_done(name: str) -> bool:
        tally = tallies[name]
        return bool(tally.missing) or (PROMISES[name].is_reached(tally) and not set(tally.problems) - set(tally.tried))

    while time.monotonic() < until and not all(map(is_done, only)):
        for name in only:
            end = min(until, time.monotonic() + SLICE * PROMISES[name].share)
            while not is_done(name) and time.monotonic() < end:
                one_case(bench, name, PROMISES[name], tallies[name])
            keep()


def one_case(bench: Bench, name: str, promise: Promise, tally: Tally) -> None:
    """Run the next case, or once more one in which something was wrong before this call."""
    began = time.monotonic()
    again = next((i for i in tally.problems if i not in tally.tried), "")
    number = int(again) if again else tally.at
    try:
        found = promise.case(bench, number)
    except (OSError, subprocess.SubprocessError, AssertionError) as error:
        found = Found("that could not be run", [f"{type(error).__name__}: {error}"])
    tally.seconds += time.monotonic() - began
    tally.tried.append(str(number))
    if found is None:
        tally.over = True
        return
    tally.mended += 1 if tally.problems.pop(str(number), None) and not found.problems else 0
    if found.problems:
        tally.problems[str(number)] = found.problems
        print(f"{name} case {number}: {found.problems}", file=sys.stderr, flush=True)
    for fact, value in found.facts.items():
        tally.facts[fact] = min(value, tally.facts.get(fact, value))
    if not again:
        tally.at += 1
        tally.runs[found.kind] = tally.runs.get(found.kind, 0) + found.tried


def table(tallies: dict[str, Tally]) -> str:
    """Return the table as Markdown."""
    rows = ["| | promise | goal | tried | share | wrong | mended | minutes |"]
    rows += ["| --- | --- | --- | --- | --: | --: | --: | --: |"]
    for name, promise in PROMISES.items():
        tally = tallies[name]
        tried = ", ".join(f"{count:,} {kind}" for kind, count in sorted(tally.runs.items())) or "–"
        tried += "".join(f"; {fact} {value:g}" for fact, value in tally.facts.items())
        shown = "100 %" if promise.is_reached(tally) else "–"
        if promise.goal and shown == "–":
            shown = f"{100 * sum(tally.runs.values()) / promise.goal:.0f} %"
        tried, shown = (f"not measured: {tally.missing}", "–") if tally.missing else (tried, shown)
        about = f"| {name} | {promise.name} | {promise.about} | {tried} | {shown} |"
        rows.append(f"{about} {len(tally.problems)} | {tally.mended} | {tally.seconds / 60:.1f} |")
    return "\n".join(rows)


def seconds(text: str) -> float:
    number, unit = float(text.rstrip("smh")), text[-1]
    return number * {"s": 1, "m": 60, "h": 3600}.get(unit, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--for", dest="time", type=seconds, default=2400, metavar="40m", help="how long to run")
    parser.add_argument("--only", default=",".join(PROMISES), help="P1,P5,…")
    parser.add_argument(
        "--keep", type=Path, default=ROOT / ".forge" / "log" / "reliability.json", help="what was found"
    )
    wishes = parser.parse_args()
    known = json.loads(wishes.keep.read_text()) if wishes.keep.is_file() else {}
    tallies = {name: Tally(**(known.get(name, {}) | {"tried": []})) for name in PROMISES}
    place = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None, prefix="reliability-"))
    bench = Bench(place, known.get("calls"))

    def keep() -> None:
        counted = {"calls": found} if (found := bench.__dict__.get("calls", bench.known)) else {}
        wishes.keep.parent.mkdir(parents=True, exist_ok=True)
        wishes.keep.write_text(json.dumps({name: tally.__dict__ for name, tally in tallies.items()} | counted))

    try:
        measure(bench, tallies, time.monotonic() + wishes.time, wishes.only.split(","), keep)
    finally:
        bench.close()
        shutil.rmtree(place, ignore_errors=True)
        keep()
    print(table(tallies))
    sys.exit(3 if any(tally.problems for tally in tallies.values()) else 0)


if __name__ == "__main__":
    main()
