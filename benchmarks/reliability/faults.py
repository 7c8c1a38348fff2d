"""P1–P6: kills, cut power, errors and full disks, damaged caches, several builds at once."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

from benchmarks.reliability.place import EVERY, Bench, Found, Problems, at, workers
from tests.build.test_faults import PUBLISHES
from tests.conftest import Project, Ran
from tests.survival import damages, entries, leftovers, spoil

KINDS = ("kill", "late-kill", "EIO", "late-EIO", "ENOSPC", "late-ENOSPC")
EXT4_IOC_SHUTDOWN, NOLOGFLUSH = 0x8004587D, 2
# full disks: what lies on one → KiB of the smallest (where it is all, the project's own files must fit), and of a step
PLACES, SIZES = {"cache": (16, 12), "out": (4, 4), "project": (300, 12)}, 40


def kill(bench: Bench, i: int) -> Found:
    """Of ten cases five are kills at a system call, three by time, one a chain of kills, one a signal."""
    which = ("call", "time", "call", "call", "time", "call", "chain", "call", "time", "signal")[i % 10]
    with bench.clone() as root:
        if which == "call":
            number = i // 10 * 5 + (0, 0, 1, 2, 0, 3, 0, 4)[i % 10]
            if number < len(bench.calls):
                return _kill_at_call(bench, root, *bench.calls[number])
            which = "time"
        if which == "chain":
            return _kill_in_chains(bench, root, random.Random(i))
        return (_kill_by_time if which == "time" else _interrupt)(bench, root, random.Random(i))


def _kill_at_call(bench: Bench, root: Path, name: str, n: int) -> Found:
    ran, _ = bench.watched(root, [name], lambda _, i: "kill" if i == n else "")
    missed = [] if ran.code == -9 else [f"not killed: {ran.code}"]
    return Found("system calls", at(f"{name} {n}", missed + bench.mends_itself(root, kills=1)))


def _kill_in_chains(bench: Bench, root: Path, dice: random.Random) -> Found:
    kills = dice.randint(2, 4)
    for _ in range(kills):
        bench.quick.forge(root, "build", "--json", FORGE_FAULT=f"kill:{dice.randint(1, 12)}")
    return Found("chains of 2–4", bench.mends_itself(root, kills=kills))


def _kill_by_time(bench: Bench, root: Path, dice: random.Random) -> Found:
    """Kill a build in one process; one in six times the real command, with its worker or without."""
    if dice.randrange(6):
        running = bench.quick.start(root, "build", "--json", REHEARSAL_PAUSE="0.01")
        time.sleep(dice.uniform(0.0, 0.5))
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    else:
        process = Project(root).start("build", "--json", REHEARSAL_PAUSE="0.03")
        time.sleep(dice.uniform(0.1, 1.6))
        whom = [process.pid] if dice.random() < 0.5 else [*workers(process.pid), process.pid]
        for pid in whom:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
    return Found("by time", bench.mends_itself(root, kills=1))


def _interrupt(bench: Bench, root: Path, dice: random.Random) -> Found:
    number = dice.choice([signal.SIGINT, signal.SIGTERM])
    process = Project(root).start("build", "--json", REHEARSAL_PAUSE="0.03")
    time.sleep(dice.uniform(0.1, 1.6))
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    early = "KeyboardInterrupt" in err or process.returncode == -signal.SIGTERM  # before forge listened
    fine = early or process.returncode in (0, 128 + number)
    problems = [] if fine else [f"code {process.returncode}: {out}{err}"]
    return Found("signals", problems + bench.mends_itself(root, kills=1))


def power(bench: Bench, i: int) -> Found:
    """Cut the power of an ext4 disk at some moment of a build, or right after it said that it is done."""
    image, mount = bench.place / "disk.img", bench.place / "disk"
    mount.mkdir(exist_ok=True)
    subprocess.run(["truncate", "-s", "48M", str(image)], check=True)
    subprocess.run(["mkfs.ext4", "-qF", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
    problems: Problems = []
    try:
        root = bench.whole.clone(mount / "project")
        os.sync()
        running = bench.quick.start(root, "build", "--json", REHEARSAL_PAUSE="0.02")
        finished = i % 4 == 3
        if finished:
            assert running.wait().code == 0
        else:
            time.sleep(random.Random(i).uniform(0.0, 0.6))
        fd = os.open(mount, os.O_RDONLY)
        fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, struct.pack("I", NOLOGFLUSH))
        os.close(fd)
        if not finished:
            os.kill(running.pid, signal.SIGKILL)
            finished = running.wait().code == 0
        subprocess.run(["umount", str(mount)], check=True)
        after = bench.place / "after.img"  # a copy, since the kernel may still know the disk that was shut down
        subprocess.run(["cp", "--sparse=always", str(image), str(after)], check=True)
        subprocess.run(["mount", "-o", "loop", str(after), str(mount)], check=True)
        if finished:
            problems += at("done, and lost", bench.whole.differences(root))
        problems += bench.mends_itself(root)
    finally:
        subprocess.run(["umount", str(mount)], check=False)
        image.unlink()
        (bench.place / "after.img").unlink(missing_ok=True)
    return Found("after it said done" if finished else "during a build", problems)


def io_error(bench: Bench, i: int) -> Found | None:
    """Let the n-th publish, or the n-th system call that changes something, fail once or from then on."""
    publishes = [f"{kind}:{n}{more}" for n in range(1, PUBLISHES + 1) for more in ("", "+") for kind in KINDS[2:]]
    calls = [(c, n, e, s) for c, n in bench.calls for e in ("EIO", "ENOSPC") for s in ("", "+")]
    random.Random(2).shuffle(calls)
    if i >= len(publishes) + len(calls):
        return None
    with bench.clone() as root:
        if i < len(publishes):
            kind, where, allowed = "publishes", publishes[i], {4}
            ran = bench.quick.forge(root, "build", "--json", FORGE_FAULT=where)
        else:
            call, n, error, more = calls[i - len(publishes)]
            # only publishes flush files and make them read-only; 0: not needed; 120: words that nobody can read
            where, allowed = f"{call} {n}{more} {error}", {4} if call in ("fsync", "fchmod") else {0, 4, 120}
            ran, counts = bench.watched(
                root, [call], lambda _, at_call: error if at_call == n or (more and at_call > n) else ""
            )
            kind = "system calls" if counts[call] >= n else "calls that never came"
        return Found(kind, at(where, _ended(bench, root, ran, allowed) + bench.mends_itself(root)))


def _ended(bench: Bench, root: Path, ran: Ran, allowed: set[int]) -> Problems:
    """Say what is wrong with how a build ended that met a fault; one that says that it is done has all files there."""
    said = ran.out + ran.err
    problems = [] if ran.code in allowed and "Traceback" not in said else [f"code {ran.code}: {said[-400:]}"]
    return problems + (at("done, it said", bench.whole.differences(root)) if ran.code == 0 else [])


def full_disk(bench: Bench, i: int) -> Found | None:
    """Build on a disk of some size, then make room, and build again."""
    if i >= len(PLACES) * SIZES:
        return None
    which = tuple(PLACES)[i % 3]
    first, step = PLACES[which]
    size = first + step * (i // 3)
    with bench.clone() as root:
        mount = root / which if which != "project" else root.parent / "small"
        mount.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(mount)], check=True)
        try:
            where = bench.whole.clone(mount / "project") if which == "project" else root
            ran = bench.quick.forge(where, "build", "--json")
            problems = _ended(bench, where, ran, {0, 4})
            subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
            problems += bench.mends_itself(where)
        finally:
            subprocess.run(["umount", str(mount)], check=False)
    return Found(f"{which} too small", at(f"{which} of {size} KiB", problems), 1 if ran.code else 0)


def damage(bench: Bench, i: int) -> Found:
    """Damage one entry of a cache. `verify` must name it; a build must not use it, and must mend it."""
    with bench.clone(built=True) as root:
        kind, where, path, seen_by_verify = _damaged(root, i)
        shutil.rmtree(root / "out")
        twin = root.parent / "twin"
        if seen_by_verify:
            shutil.copytree(root, twin, symlinks=True)
        problems: Problems = []
        ran = bench.quick.forge(root, "build", "--json")
        if ran.code not in (0, 3) or "Traceback" in ran.out + ran.err:
            problems.append(f"build: {ran.code} {ran.out[-300:]}{ran.err[-300:]}")
        if ran.code == 3:
            ran = bench.quick.forge(root, "build", "--json")
            problems += [f"second build: {ran.code} {ran.out[-300:]}"] if ran.code != 0 else []
        problems += bench.whole.differences(root)
        if seen_by_verify:
            seen = bench.quick.forge(twin, "verify", "--json")
            named = path.name in seen.out or (kind == "states" and path.stem in seen.out)  # of two files that disagree
            if seen.code != 3 or not named:
                problems.append(f"verify did not see it: {seen.code} {seen.out[-300:]}{seen.err[-300:]}")
        return Found(kind, at(where, problems))


def _damaged(root: Path, i: int) -> tuple[str, str, Path, bool]:
    """Do all damages to all entries; then change single bits, and cut off ends, at random places."""
    ways, found = damages(), list(entries(root / "cache"))
    kind, path, other = found[i % len(found)]
    if i < len(found) * len(ways):
        name, change = list(ways.items())[(i // len(found) + i) % len(ways)]
        change(path, other)
        seen = kind != "index" and name not in ("remove", "pipe")
    else:
        dice, data = random.Random(i), bytearray(path.read_bytes())
        place = dice.randrange(len(data))
        if dice.random() < 0.8:
            name, data[place] = f"bit {place}", data[place] ^ 1 << dice.randrange(8)
        else:
            name, data = f"end {place}", data[:place]
        spoil(path, bytes(data))
        seen = kind != "index"
    return kind, f"{name} of {path.relative_to(root)}", path, seen


def concurrency(bench: Bench, i: int) -> Found:
    """Four builds of two projects on one cache at once; sometimes with a clean-up, sometimes one is killed."""
    dice, kind = random.Random(i), ("builds", "with clean", "with a kill")[i % 3]
    with bench.clone() as one:
        two = bench.whole.clone(one.parent / "two")
        cache, log = str(one.parent / "cache"), one.parent / "log"
        environment = {"FORGE_CACHE": cache, "REHEARSAL_LOG": str(log), "REHEARSAL_PAUSE": "0.01"}
        running = [bench.quick.start(root, "build", "--json", **environment) for root in (one, two, one, two)]
        cleans = []
        if kind == "with clean":
            time.sleep(dice.uniform(0, 0.3))
            cleans = [bench.quick.start(one, "clean", "--json", **environment) for _ in range(2)]
        if kind == "with a kill":
            time.sleep(dice.uniform(0.02, 0.4))
            os.kill(running[0].pid, signal.SIGKILL)
        codes = [each.wait().code for each in running]
        wanted = {0, -9} if kind == "with a kill" else {0}
        problems = [f"codes {codes}"] if set(codes) - wanted else []
        codes = [each.wait().code for each in cleans]
        problems += [f"codes of clean {codes}"] if set(codes) - {0, 5} else []
        steps = [line for line in log.read_text().splitlines() if line.startswith("step")]
        repeated = len(steps) - len(set(steps))
        if repeated > (EVERY + 1 if kind == "with a kill" else 0):
            problems.append(f"{repeated} steps run twice")
        for root in (one, two):
            ran = bench.quick.forge(root, "build", "--json", FORGE_CACHE=cache)
            problems += [] if ran.code == 0 else [f"afterwards: {ran.code}"]
            problems += bench.whole.differences(root)
        problems += leftovers(one, Path(cache))
    return Found(kind, at(kind, problems))
