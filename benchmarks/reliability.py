"""How much of the promises P1–P16 holds: `python -m benchmarks.reliability --for 40m`.

Every promise has cases, numbered; each is a toy project to which something is done, and that must then be as if nothing
had been. Batches of cases run in turn until the time is over; what was found is kept in a file, so that the next call
goes on from there, and a table of all calls is printed. Needs strace for kills at system calls, and root for cut power
(a loop device with ext4) and full disks (tmpfs); what cannot be had is said to be not measured.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import Project, new_project
from tests.quick import Quick
from tests.survival import Whole, damages, entries, leftovers
from tests.toys import write_checkpoint

ROOT = Path(__file__).parents[1]
FORGE = Path(sys.executable).with_name("forge")
SLICE = 25.0  # seconds for one promise before it is the next one's turn
CALLS = ("fsync", "rename", "unlink", "unlinkat", "rmdir", "mkdir", "fchmod", "ftruncate", "pwrite64", "write")
KINDS = ("kill", "late-kill", "EIO", "late-EIO", "ENOSPC", "late-ENOSPC")
EXT4_IOC_SHUTDOWN, NOLOGFLUSH = 0x8004587D, 2
RECIPE = """\
family = "sd15"

[rehearsal.a]
on = "base"
dataset = "drawings"
steps = 6

[preset]
checkpoint = "a"
"""
TRAINING = """\
family = "sd15"

[textual_inversion.word]
on = "base"
dataset = "drawings"
token = "<toy>"
steps = 6
resolution = 64

[preset]
checkpoint = "base"
insert = ["word"]
"""
EVERY, STEPS = 2, 6  # steps between states of the rehearsal, and of all

Problems = list[str]


@dataclass
class Tally:
    """What is known of one promise. runs: kind → cases; problems: case → what was wrong."""

    runs: dict[str, int] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    at: int = 0  # the next case
    over: bool = False
    tried: list[str] = field(default_factory=list)  # cases of this call
    missing: str = ""  # why it cannot be measured here


class Bench:
    """The place in which cases run, and the toy that was built without a fault."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.quick = Quick()
        base = place / "base"
        write_checkpoint(base)
        self.whole = self._built(place / "whole", base, RECIPE)
        self.base = base
        self._trained: Whole | None = None
        self._counts: dict[str, int] = {}

    def _built(self, root: Path, base: Path, recipe: str) -> Whole:
        new_project(root, base, recipe)
        ran = self.quick.forge(root, "build", "--json")
        assert ran.code == 0, ran.out + ran.err
        return Whole(root)

    @property
    def trained(self) -> Whole:
        """A real training of the toy, with a state at every step."""
        if self._trained is None:
            root = self.place / "trained"
            new_project(root, self.base, TRAINING)
            with (root / "forge.toml").open("a") as file:
                file.write("\n[run]\nstates = { steps = 1 }\n")
            assert self.quick.forge(root, "build", "--json").code == 0
            self._trained = Whole(root)
        return self._trained

    @contextmanager
    def clone(self, whole: Whole | None = None, *, built: bool = False) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(dir=self.place, prefix="case-"))
        found = whole or self.whole
        try:
            yield (found.copy if built else found.clone)(folder / "project")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def mends_itself(self, root: Path, whole: Whole | None = None, *, kills: int = 0) -> Problems:
        """Say what is wrong after a fault: nothing half, one more build mends all, and no more work than promised."""
        whole, problems = whole or self.whole, []
        seen = self.quick.forge(root, "verify", "--json")
        if seen.code != 0:
            problems.append(f"verify after the fault: {seen.out[-300:]}{seen.err[-300:]}")
        ran = self.quick.forge(root, "build", "--json")
        if ran.code != 0 or "Traceback" in ran.out + ran.err:
            problems.append(f"the next build: {ran.code} {ran.out[-300:]}{ran.err[-300:]}")
        if not ran.built and not ran.restored:  # a build with nothing to do changes no file, so it sweeps nothing
            self.quick.forge(root, "clean")
        problems += whole.differences(root) + leftovers(root)
        if (again := self.quick.forge(root, "build", "--json").built) != []:
            problems.append(f"built once more: {again}")
        log = root / "rehearsal.log"
        steps = [line for line in log.read_text().splitlines() if line.startswith("step")] if log.is_file() else []
        if kills and len(steps) - len(set(steps)) > kills * (EVERY + 1):
            problems.append(f"{len(steps) - len(set(steps))} steps run twice after {kills} kills")
        return problems

    def traced(self, root: Path, *options: str) -> subprocess.CompletedProcess[str]:
        """Run a build within one process under strace."""
        environment = os.environ | {"FORGE_METHODS": str(ROOT / "tests" / "methods"), "PYTHONPATH": str(ROOT)}
        environment |= {"REHEARSAL_LOG": str(root / "rehearsal.log"), "PYTHONDONTWRITEBYTECODE": "1"}
        command = ["strace", "-f", "-qq", "--seccomp-bpf", *options, sys.executable, "-m", "tests.quick"]
        return subprocess.run(
            [*command, "-C", str(root), "build", "--json"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def calls(self) -> list[tuple[str, int]]:
        """Return the points of a build at which the system is asked to change something: (call, how manieth)."""
        if not self._counts:
            with self.clone() as root:
                log = root.parent / "calls"
                self.traced(root, "-o", str(log), "-e", f"trace={','.join(CALLS)}")
                text = log.read_text(errors="replace")
            self._counts = {name: len(re.findall(rf"^\d+ +{name}\(", text, re.M)) for name in CALLS}
        rare = [(name, n) for name in CALLS[:-2] for n in range(1, self._counts[name] + 1)]
        writes = [(name, n) for name in CALLS[-2:] for n in range(1, self._counts[name] + 1)]
        random.Random(1).shuffle(writes)
        return rare + writes


# -- P1: kill -9 -------------------------------------------------------------------------------------------------------


def kill(bench: Bench, i: int) -> tuple[str, Problems] | None:
    """Alternate: a kill at a system call, by time, a chain of kills, a signal."""
    dice = random.Random(i)
    which = ("call", "call", "time", "call", "call", "chain", "call", "call", "time", "signal")[i % 10]
    with bench.clone() as root:
        if which == "call":
            points = bench.calls()
            number = i // 10 * 6 + i % 10 - (i % 10 > 2) - (i % 10 > 5)
            if number >= len(points):
                return "all calls done", []
            name, n = points[number]
            bench.traced(root, "-o", "/dev/null", "-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={n}")
            return "system calls", _at(f"{name} {n}", bench.mends_itself(root, kills=1))
        if which == "chain":
            kills = dice.randint(2, 4)
            for _ in range(kills):
                bench.quick.forge(root, "build", "--json", FORGE_FAULT=f"kill:{dice.randint(1, 12)}")
            return "chains of 2–4", bench.mends_itself(root, kills=kills)
        process = Project(root).start("build", "--json", REHEARSAL_PAUSE="0.03")
        time.sleep(dice.uniform(0.1, 1.6))
        if which == "time":
            whom = [process.pid] if dice.random() < 0.5 else [*_workers(process.pid), process.pid]
            for pid in whom:
                os.kill(pid, signal.SIGKILL)
            process.communicate()
            return "by time", bench.mends_itself(root, kills=1)
        number = dice.choice([signal.SIGINT, signal.SIGTERM])
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=60)
        problems = [] if process.returncode in (0, 128 + number) else [f"code {process.returncode}: {out}{err}"]
        early = "KeyboardInterrupt" in err or process.returncode == -signal.SIGTERM  # before forge listened
        return "signals", ([] if early else problems) + bench.mends_itself(root, kills=1)


def _at(where: str, problems: Problems) -> Problems:
    return [f"{where}: {problem}" for problem in problems]


def _workers(pid: int) -> list[int]:
    try:
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


# -- P2: power, P3: errors, P4: a full disk ----------------------------------------------------------------------------


def power(bench: Bench, i: int) -> tuple[str, Problems] | None:
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
            problems += _at("done, and lost", bench.whole.differences(root))
        problems += bench.mends_itself(root)
    finally:
        subprocess.run(["umount", str(mount)], check=False)
        image.unlink()
        (bench.place / "after.img").unlink(missing_ok=True)
    return "after it said done" if finished else "during a build", problems


def io_error(bench: Bench, i: int) -> tuple[str, Problems] | None:
    """Let the n-th publish, or the n-th system call that changes something, fail once or from then on."""
    publishes = [f"{kind}:{n}{more}" for n in range(1, 24) for more in ("", "+") for kind in KINDS[2:]]
    calls = [(c, n, e, s) for c, n in bench.calls() for e in ("EIO", "ENOSPC") for s in ("", "+")]
    random.Random(2).shuffle(calls)
    with bench.clone() as root:
        if i % 2 == 0 and i // 2 < len(publishes):
            ran = bench.quick.forge(root, "build", "--json", FORGE_FAULT=publishes[i // 2])
            code, said, where, kind = ran.code, ran.out + ran.err, publishes[i // 2], "publishes"
        elif i // 2 < len(calls):
            call, n, error, more = calls[i // 2]
            options = ("-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={n}{more}")
            done = bench.traced(root, "-o", "/dev/null", *options)
            code, said, where, kind = (
                done.returncode,
                done.stdout + done.stderr,
                f"{call} {n}{more} {error}",
                "system calls",
            )
        else:
            return None
        problems = [] if code in (0, 1, 4, 120) and "Traceback" not in said else [f"code {code}: {said[-400:]}"]
        return kind, _at(where, problems + bench.mends_itself(root))


def full_disk(bench: Bench, i: int) -> tuple[str, Problems] | None:
    """Build on a disk of some size, then make room, and build again."""
    places, sizes = ("cache", "out", "project"), 40
    if i >= len(places) * sizes:
        return None
    which, size = places[i % 3], 16 + 40 * (i // 3)  # KiB
    with bench.clone() as root:
        mount = root / which if which != "project" else root.parent / "small"
        mount.mkdir()
        extra = 1100 if which == "project" else 0  # what the project's own files need
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size + extra}k", "tmpfs", str(mount)], check=True)
        try:
            where = bench.whole.clone(mount / "project") if which == "project" else root
            ran = bench.quick.forge(where, "build", "--json")
            said = ran.out + ran.err
            problems = [] if ran.code in (0, 4) and "Traceback" not in said else [f"code {ran.code}: {said[-300:]}"]
            subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
            problems += bench.mends_itself(where)
        finally:
            subprocess.run(["umount", str(mount)], check=False)
    return which, _at(f"{which} of {size} KiB", problems)


# -- P5: damage --------------------------------------------------------------------------------------------------------


def damage(bench: Bench, i: int) -> tuple[str, Problems] | None:
    """Damage one entry of a cache. `verify` must name it; a build must not use it, and must mend it."""
    ways = damages()
    with bench.clone(built=True) as root:
        found = list(entries(root / "cache"))
        if i >= len(found) * len(ways):
            return None
        kind, path, other = found[i % len(found)]
        name, change = list(ways.items())[(i // len(found) + i) % len(ways)]
        where = f"{name} of {path.relative_to(root)}"
        change(path, other)
        shutil.rmtree(root / "out")
        twin = root.parent / "twin"
        if name != "pipe":
            shutil.copytree(root, twin, symlinks=True)
        problems: Problems = []
        ran = bench.quick.forge(root, "build", "--json")
        if ran.code not in (0, 3) or "Traceback" in ran.out + ran.err:
            problems.append(f"build: {ran.code} {ran.out[-300:]}{ran.err[-300:]}")
        if ran.code == 3:
            ran = bench.quick.forge(root, "build", "--json")
            problems += [f"second build: {ran.code} {ran.out[-300:]}"] if ran.code != 0 else []
        problems += bench.whole.differences(root)
        if kind != "index" and name != "remove" and twin.is_dir():
            seen = bench.quick.forge(twin, "verify", "--json")
            named = path.name in seen.out or (kind == "states" and path.stem in seen.out)  # of two files that disagree
            if seen.code != 3 or not named:
                problems.append(f"verify did not see it: {seen.code} {seen.out[-300:]}{seen.err[-300:]}")
        return kind, _at(where, problems)


# -- P6: several at once -----------------------------------------------------------------------------------------------


def concurrency(bench: Bench, i: int) -> tuple[str, Problems] | None:
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
    return kind, _at(kind, problems)


# -- P7, P8: texts and files -------------------------------------------------------------------------------------------

PIECES = (
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b"'",
    b"=",
    b".",
    b",",
    b"\n",
    b"#",
    b"\\u0000",
    b"\xff",
    b"9" * 40,
    b"-1",
    b"nan",
)
WORDS = (
    b"lora",
    b"bake",
    b"insert",
    b"preset",
    b"base",
    b"a:b",
    b"../x",
    b"on",
    b"weights",
    b"true",
    b"1e400",
    b"dataset",
)


def recipes(bench: Bench, i: int) -> tuple[str, Problems] | None:  # noqa: ARG001 -- every case's form
    """Read a hundred mutants of the shipped recipes: each is read, or refused with its mistakes."""
    from sdforge.errors import RecipeError, UsageError
    from sdforge.recipe import read_recipe

    texts = [path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.toml"))]
    dice, problems = random.Random(i), []
    for n in range(100):
        text = mutant(dice, dice.choice(texts))
        began = time.process_time()
        try:
            read_recipe(text, "toy", "toy.toml")
        except (RecipeError, UsageError):
            pass
        except Exception as error:
            problems.append(f"{i}.{n}: {type(error).__name__}: {error}")
        if time.process_time() - began > 5:
            problems.append(f"{i}.{n}: took {time.process_time() - began:.1f} s")
    return "mutants, in hundreds", problems


def mutant(dice: random.Random, text: bytes) -> bytes:
    """Change a text at one to six places."""
    data = bytearray(text)
    for _ in range(dice.randint(1, 6)):
        at = dice.randrange(len(data) + 1)
        what = dice.randrange(5)
        if what == 0 and data:
            data[at % len(data)] ^= 1 << dice.randrange(8)
        elif what == 1:
            data[at:at] = dice.choice(PIECES)
        elif what == 2:
            data[at:at] = dice.choice(WORDS)
        elif what == 3:
            del data[at : at + dice.randint(1, 30)]
        else:
            data[at:at] = data[dice.randrange(len(data) + 1) :][: dice.randint(1, 60)]
    return bytes(data)


def headers(bench: Bench, i: int) -> tuple[str, Problems] | None:
    """Read a thousand mutants of a small safetensors file: what the library refuses is refused."""
    from safetensors import SafetensorError, deserialize

    from sdforge.errors import UsageError
    from sdforge.formats.safetensors import read_header

    text = (
        b'{"__metadata__":{"a":"b"},"x":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},'
        b'"y":{"dtype":"F32","shape":[1],"data_offsets":[12,16]}}'
    )
    dice, problems, path = random.Random(i), [], bench.place / "header"
    for n in range(1000):
        changed = mutant(dice, text)
        length = len(changed) if dice.random() < 0.9 else dice.choice([0, 1, len(changed) + 1, 2**40, 2**63, 2**64 - 1])
        data = struct.pack("<Q", length) + changed + bytes(16 if dice.random() < 0.9 else dice.randrange(40))
        path.write_bytes(data)
        try:
            read_header(path)
        except UsageError:
            continue
        try:
            deserialize(data)
        except (SafetensorError, TypeError, OverflowError) as error:
            problems.append(f"{i}.{n}: accepted, and the library says {error}: {data!r:.300}")
    return "mutants, in thousands", problems


# -- P11, P12: the same bits -------------------------------------------------------------------------------------------

SURROUNDINGS: tuple[dict[str, str], ...] = (
    {"OMP_NUM_THREADS": "1"},
    {"OMP_NUM_THREADS": "2"},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "2"},
    {"MKL_CBWR": "COMPATIBLE"},
    {"MKL_CBWR": "AVX2"},
    {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"OPENBLAS_CORETYPE": "Haswell"},
    {"OPENBLAS_CORETYPE": "Prescott"},
    {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F"},
    {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "2"},
    {"LC_ALL": "de_DE.UTF-8", "TZ": "Asia/Kathmandu"},
    {"PYTHONHASHSEED": "1"},
    {"MALLOC_PERTURB_": "170"},
)


def surroundings(bench: Bench, i: int) -> tuple[str, Problems] | None:  # noqa: ARG001
    """Compute every merge in three dtypes in another surrounding: the committed digests come out."""
    if i >= len(SURROUNDINGS):
        return None
    command = [sys.executable, "-m", "tests.merges.test_merge_vectors"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | SURROUNDINGS[i], capture_output=True, text=True, check=False
    )
    wanted = json.loads((ROOT / "tests/merges/vectors.json").read_text())
    if done.returncode:
        return "surroundings", [f"{SURROUNDINGS[i]}: {done.stderr[-300:]}"]
    found = json.loads(done.stdout)
    differ = [case for case in wanted if found.get(case) != wanted[case]]
    return "surroundings", _at(str(SURROUNDINGS[i]), differ)


def training(bench: Bench, i: int) -> tuple[str, Problems] | None:
    """Kill a real training (torch) after one of its states, and go on; or repeat it."""
    if i >= 24:
        return None
    whole = bench.trained
    with bench.clone(whole) as root:
        if i % 8 == 7:
            ran = bench.quick.forge(root, "build", "--json")
            return "repeats", [*whole.differences(root), *([] if ran.code == 0 else [ran.out[-300:]])]
        fault = f"{('kill', 'late-kill')[i % 2]}:{i % 8 * 2 + 4}"
        ran = bench.quick.forge(root, "build", "--json", FORGE_FAULT=fault)
        problems = [] if ran.code == -9 else [f"not killed by {fault}: {ran.code}"]
        return "resumed", _at(fault, problems + bench.mends_itself(root, whole))


# -- P16: what it costs ------------------------------------------------------------------------------------------------


def costs(
    bench: Bench,  # noqa: ARG001
    i: int,
    facts: dict[str, float],
) -> tuple[str, Problems] | None:
    """Time a publish of 4 KiB on the disk on which the repository lies."""
    from sdforge.store.files import publish_bytes

    if i >= 10:
        return None
    place = Path(tempfile.mkdtemp(dir=ROOT / "cache"))
    times = []
    for n in range(50):
        began = time.perf_counter()
        publish_bytes(os.urandom(4096), place / f"{n}", place / "tmp")
        times.append(time.perf_counter() - began)
    shutil.rmtree(place)
    times.sort()
    name = ("median", "p95")
    for label, value in zip(name, (times[25], times[47]), strict=True):
        facts[f"publish {label} ms"] = min(facts.get(f"publish {label} ms", 1e9), round(1000 * value, 2))
    return "publishes, in fifties", []


# -- the rest: what the suite measures ---------------------------------------------------------------------------------


def suite(*arguments: str) -> Callable[[Bench, int], tuple[str, Problems] | None]:
    """Let tests of the suite be the measurement."""

    def run(bench: Bench, i: int) -> tuple[str, Problems] | None:  # noqa: ARG001
        if i:
            return None
        command = [sys.executable, "-m", "pytest", "-n", "0", "-rf", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        passed = re.search(r"(\d+) passed", done.stdout)
        failed = re.findall(r"^FAILED .*", done.stdout, re.M)
        return f"tests ({passed[1] if passed else 0} passed)", failed or ([] if passed else [done.stdout[-300:]])

    return run


@dataclass(frozen=True)
class Promise:
    """A row of `reference/reliability.md` §4. lacks: what a machine must have; why it is not measured without."""

    name: str
    goal: str
    case: Callable[..., tuple[str, Problems] | None] | None
    lacks: Callable[[], str] = lambda: ""
    share: float = 1.0  # of a slice


def without_strace() -> str:
    return "" if shutil.which("strace") else "strace is not installed"


def without_root() -> str:
    return "" if os.geteuid() == 0 and shutil.which("mkfs.ext4") else "needs root, and ext4 on a loop device"


PROMISES = {
    "P1": Promise("kill -9", "1,000 points, 500 of them system calls", kill, without_strace, 4),
    "P2": Promise("power loss", "200 cuts", power, without_root, 1.5),
    "P3": Promise("I/O errors", "every call × {EIO, ENOSPC} × {once, always}", io_error, without_strace, 3),
    "P4": Promise("disk full", "36 sizes × 3 places", full_disk, without_root),
    "P5": Promise("corrupt cache", "1,000 damages", damage, share=2),
    "P6": Promise("several at once", "200 rounds × 4 builds", concurrency),
    "P7": Promise("hostile recipes", "10⁶ mutants", recipes),
    "P8": Promise("hostile model files", "10⁷ mutants of headers", headers),
    "P9": Promise("pickles", "19 kinds of payload, none runs", suite("tests/formats/test_pickles.py")),
    "P10": Promise("remotes", "26 faults", None),
    "P11": Promise("class A", "19 surroundings, 3 instruction sets, 2 architectures", surroundings),
    "P12": Promise("class B", "3 repeats, 20 resumes", training),
    "P13": Promise("untrusted recipes", "0 sockets, 0 programs, 0 files outside", suite("tests/build/test_outside.py")),
    "P14": Promise("secrets", "4 canaries, 0 hits", suite("tests/build/test_outside.py", "-k", "secret")),
    "P15": Promise(
        "numbers", "100 % of planted NaN and overflow stop", suite("tests", "-k", "nan or overflow or finite")
    ),
    "P16": Promise("cost", "publish ≤ 20 ms", costs, share=0.2),
}


def measure(bench: Bench, tallies: dict[str, Tally], until: float, only: list[str], keep: Callable[[], None]) -> None:
    """Run batches in turn until the time is over or all is done."""
    for name, promise in PROMISES.items():
        tallies[name].missing = promise.lacks() or ("" if promise.case else "no part of this benchmark yet")
    while time.monotonic() < until and any(not (t.over or t.missing) for n, t in tallies.items() if n in only):
        for name in only:
            tally, promise = tallies[name], PROMISES[name]
            end = min(until, time.monotonic() + SLICE * promise.share)
            while not (tally.over or tally.missing) and time.monotonic() < end:
                one_case(bench, name, promise, tally)
            keep()


def one_case(bench: Bench, name: str, promise: Promise, tally: Tally) -> None:
    """Run the next case, or once more one in which something was wrong before this call."""
    assert promise.case is not None
    began = time.monotonic()
    again = next((i for i in tally.problems if i not in tally.tried), "")
    number = int(again) if again else tally.at
    try:
        found = promise.case(bench, number, *([tally.facts] if promise.case is costs else []))
    except (OSError, subprocess.SubprocessError, AssertionError) as error:
        found = "that could not be run", [f"{type(error).__name__}: {error}"]
    tally.seconds += time.monotonic() - began
    tally.tried.append(str(number))
    if found is None:
        tally.over = True
        return
    kind, problems = found
    tally.problems.pop(str(number), None)
    if problems:
        tally.problems[str(number)] = problems
        print(f"{name} case {number}: {problems}", file=sys.stderr, flush=True)
    if not again:
        tally.at += 1
        if kind != "all calls done":
            tally.runs[kind] = tally.runs.get(kind, 0) + 1


def table(tallies: dict[str, Tally]) -> str:
    """Return the table as Markdown."""
    rows = ["| | promise | goal | run | wrong | minutes |", "| --- | --- | --- | --- | --: | --: |"]
    for name, promise in PROMISES.items():
        tally = tallies[name]
        runs = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.runs.items())) or "–"
        runs += " (all there are)" if tally.over else ""
        facts = "".join(f"; {fact} {value:g}" for fact, value in tally.facts.items())
        text = f"not measured: {tally.missing}" if tally.missing else runs + facts
        minutes = f"{tally.seconds / 60:.1f}"
        rows.append(f"| {name} | {promise.name} | {promise.goal} | {text} | {len(tally.problems)} | {minutes} |")
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

    def keep() -> None:
        wishes.keep.parent.mkdir(parents=True, exist_ok=True)
        wishes.keep.write_text(json.dumps({name: tally.__dict__ for name, tally in tallies.items()}, indent=1))

    place = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None, prefix="reliability-"))
    bench = Bench(place)
    try:
        measure(bench, tallies, time.monotonic() + wishes.time, wishes.only.split(","), keep)
    finally:
        bench.quick.close()
        shutil.rmtree(place, ignore_errors=True)
        keep()
    print(table(tallies))
    sys.exit(3 if any(tally.problems for tally in tallies.values()) else 0)


if __name__ == "__main__":
    main()
