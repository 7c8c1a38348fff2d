"""`forge doctor`: is this machine fit to build? One line for each thing, and what to do about it. Nothing is changed.

torch is imported by a child process only, which also computes the golden vectors of class A.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sdforge.errors import UsageError, counted
from sdforge.places import cache_folder, find_root
from sdforge.report.words import glyphs, safe, size
from sdforge.store import FOLDERS, INDEX, LAYOUT
from sdforge.store.files import clone, is_abandoned

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "pydantic", "pillow")
LEAST_DISK, LEAST_MEMORY = (
    10 * 10**9,
    4 * 10**9,
)  # bytes: a checkpoint of SD 1.5 is 2 GB, its training state thrice that
LEAST_FILES = 1000  # further files that the disk takes: a small preset makes about a hundred
DRIFT = 2.0  # seconds between the clocks of a file system and of the machine: as much as the stat cache allows for
NVIDIA, AMD, DISPLAY = "0x10de", "0x1002", "0x03"  # makers of PCI devices, and how the class of displays begins
PATIENCE = 180.0  # seconds for the child, which has to import torch


@dataclass(frozen=True)
class Finding:
    """One line. code: 0 where all is well, 3 or 4 (as exit codes) where something is broken; hint: the way out."""

    name: str
    text: str
    hint: str = ""
    code: int = 0

    @property
    def sign(self) -> str:
        return "failed" if self.code else "warning" if self.hint else "reuse"


def doctor(start: Path, *, as_json: bool) -> int:
    """Say how it stands; return 0, or 3 before 4 for what is broken."""
    codes: set[int] = set()
    for found in findings(start):
        codes.add(found.code)
        if as_json:
            state = {"reuse": "well", "warning": "note", "failed": "broken"}[found.sign]
            row = {"name": found.name, "state": state, "text": found.text, "hint": found.hint, "code": found.code}
            print(json.dumps({"v": 1, "event": "finding", **row}), flush=True)
            continue
        print(safe(f"  {glyphs()[found.sign]} {found.name:<12} {found.text}", sys.stdout), flush=True)
        if found.hint:
            print(safe(f"      try   {found.hint}", sys.stdout), flush=True)
    return 3 if 3 in codes else max(codes)


def findings(start: Path) -> Iterator[Finding]:
    """Look at one thing after the other."""
    yield _python()
    yield from _libraries()
    yield from _computing()
    yield _memory()
    try:
        cache = cache_folder(find_root(start.resolve()))
    except UsageError:
        yield Finding("cache", "there is no project here, so there is no cache to look at", "run it within a project")
        return
    yield _disk(cache)
    yield from _file_system(cache)
    yield _cache(cache / LAYOUT)
    yield from _in_the_way(cache)


# -- versions ----------------------------------------------------------------------------------------------------------


def _python() -> Finding:
    text = f"{platform.python_implementation()} {platform.python_version()} on {platform.system()} {platform.machine()}"
    tested = "" if platform.system() == "Linux" else "Linux is what is tested; on Windows use WSL"
    return Finding("python", text, tested)


def tested_versions() -> dict[str, str]:
    """Return the versions with which sdforge is tested: library → version."""
    for place in (Path(__file__).with_name("constraints.txt"), Path(__file__).parents[1] / "constraints.txt"):
        if place.is_file():
            rows = (line.partition("==") for line in place.read_text().splitlines())
            return {name.lower(): version for name, _, version in rows if version}
    return {}


def _libraries() -> Iterator[Finding]:
    """Say what is missing or too old, and what is not as tested; one line if all is well."""
    tested, least = tested_versions(), _least_versions()
    other: list[str] = []
    unfit = 0
    for name in LIBRARIES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            unfit += 1
            yield Finding(name, "is not installed", f"pip install '{name}>={least.get(name, '0')}'", 4)
            continue
        if _numbers(version) < _numbers(least.get(name, "0")):
            unfit += 1
            yield Finding(name, f"{version} is too old", f"pip install '{name}>={least[name]}'", 4)
        elif name in tested and _numbers(version) != _numbers(tested[name]):
            other.append(f"{name} {version} (tested: {tested[name]})")
    yield from _vision(tested)
    if other:
        hint = "pip install -c constraints.txt -e . gives the tested ones; trainings differ a little between versions"
        yield Finding("libraries", ", ".join(other), hint)
    elif not unfit:
        yield Finding("libraries", "torch " + metadata.version("torch") + " and the others are those that are tested")


def _vision(tested: dict[str, str]) -> Iterator[Finding]:
    """Note a torchvision, which nothing here needs, beside a torch that it was not built for."""
    with suppress(metadata.PackageNotFoundError):
        vision, torch = metadata.version("torchvision"), metadata.version("torch")
        if "torchvision" not in tested and vision.partition("+")[2] != torch.partition("+")[2]:
            text = f"{vision} is beside torch {torch}, for which it may not be built: then diffusers cannot be imported"
            yield Finding("torchvision", text, "pip uninstall torchvision: sdforge does not need it")


def _least_versions() -> dict[str, str]:
    """Return what sdforge asks of its libraries: library → least version."""
    found, requirements = {}, []
    with suppress(metadata.PackageNotFoundError):  # it runs from its source, which states nothing
        requirements = metadata.requires("sdforge") or []
    for requirement in requirements:
        name, _, rest = requirement.partition(">=")
        if ";" not in requirement:
            found[name.strip().lower()] = rest.split(",")[0].strip()
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """Return 2.13.0+cpu as (2, 13, 0)."""
    parts = version.partition("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


# -- processors --------------------------------------------------------------------------------------------------------


def _computing() -> Iterator[Finding]:
    """Let a child compute the golden vectors, and say what it sees."""
    command = [sys.executable, "-m", "sdforge.run.golden"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
        seen: dict[str, Any] = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        yield Finding("torch", "cannot compute here", "`python -m sdforge.run.golden` says why", 4)
        return
    if seen["differing"]:
        text = f"{', '.join(seen['differing'])} come out with other bytes than everywhere else"
        hint = "merges made here are not to be relied on: try another build of torch, or another machine"
        yield Finding("arithmetic", text, hint, 3)
    else:
        how = f"in {seen['seconds']:.1f} s, {seen['processor']}"
        text = f"{seen['vectors']} known results come out right, to the bit ({how})"
        yield Finding("arithmetic", text)
    yield _kernel(seen["kernel"])
    yield _gpus(seen)
    for name, why in seen["unfit"].items():
        text = f"{name} leaves choosing and ranking of merges to the processor, to the same bytes in more time: {why}"
        yield Finding("selection", text, "a device with free memory, another driver or build of torch may serve")


def _kernel(why_not: str) -> Finding:
    """Say whether merges are computed by the compiled kernel, or why torch computes them."""
    if not why_not:
        return Finding("kernel", "merges and bakes are computed in one pass, to the bytes of torch")
    text = f"torch computes merges and bakes, to the same bytes in more time: {why_not}"
    return Finding("kernel", text, "with a C compiler `python -m sdforge.kernel` compiles it")


def _gpus(seen: dict[str, Any], root: Path = Path("/")) -> Finding:
    """Say which GPUs torch can use, and if it can use none, why: the device, its driver, or the build of torch.

    root: of the file system in which devices are looked for.
    """
    nodes = sorted(p.name for p in (root / "dev").glob("nvidia[0-9]*"))
    nodes += ["dxg (a GPU of Windows)"] if (root / "dev" / "dxg").exists() else []
    if seen["gpus"]:
        return Finding("devices", ", ".join(f"{n}: {title}, {size(memory)}" for n, title, memory in seen["gpus"]))
    if not nodes:
        return _without_driver(root)
    if not seen["built_for"]:
        return Finding("devices", f"{', '.join(nodes)} is there, and this torch was built without CUDA", "pytorch.org")
    hint = "`nvidia-smi` says whether the driver is well; CUDA_VISIBLE_DEVICES may hide the device"
    return Finding(
        "devices", f"{', '.join(nodes)} is there, and torch (CUDA {seen['built_for']}) cannot use it", hint, 4
    )


def _without_driver(root: Path) -> Finding:
    """Say what is built in where no driver offers a device that torch could use."""
    makers = {}
    for path in sorted((root / "sys/bus/pci/devices").glob("*/class")):
        with suppress(OSError):
            if path.read_text().startswith(DISPLAY):
                makers[path.with_name("vendor").read_text().strip()] = True
    if NVIDIA in makers:
        text = "an NVIDIA GPU is built in, and no driver for it is loaded; trainings run on the CPU"
        return Finding("devices", text, "install NVIDIA's driver; then `nvidia-smi` lists the GPU")
    if AMD in makers:
        return Finding("devices", "an AMD GPU is built in, which is not supported yet; trainings run on the CPU")
    return Finding("devices", "no GPU; trainings run on the CPU")


def _memory() -> Finding:
    try:
        rows = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(row for row in rows if row.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return Finding("memory", "how much is free cannot be told here")
    hint = "" if free >= LEAST_MEMORY else "end other programs: a merge needs a few tensors, a training several GB"
    return Finding("memory", f"{size(free)} to be had", hint)


# -- the cache ---------------------------------------------------------------------------------------------------------


def _there(folder: Path) -> Path:
    """Return the nearest folder above that exists."""
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _disk(cache: Path) -> Finding:
    usage, files = shutil.disk_usage(_there(cache)), os.statvfs(_there(cache))
    text = f"{size(usage.free)} of {size(usage.total)} free for {cache}"
    hint = "`forge clean --dry-run` shows what could go; FORGE_CACHE names another place"
    if files.f_files and files.f_favail < LEAST_FILES:  # of file systems without a bound both are 0
        return Finding("disk", f"{text}, and only {counted(files.f_favail, 'file')} more", hint)
    return Finding("disk", text, "" if usage.free >= LEAST_DISK else hint)


def _file_system(cache: Path) -> Iterator[Finding]:
    """Try in a folder of its own what the store asks of a file system."""
    try:
        folder = Path(tempfile.mkdtemp(dir=_there(cache), prefix=".doctor-"))
    except OSError as error:
        yield _unwritable(cache, error)
        return
    try:
        yield _abilities(folder)
        yield _clock(folder, cache / LAYOUT)
    except OSError as error:
        yield _unwritable(cache, error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unwritable(cache: Path, error: OSError) -> Finding:
    room = error.errno in (errno.ENOSPC, errno.EDQUOT)
    way = "make room (`forge clean` removes what no recipe reaches)" if room else "make it writable"
    hint = f"what is there can be used; to build, {way}, or name another place with FORGE_CACHE"
    return Finding("file system", f"{cache} cannot be written to: {error.strerror}", hint, 4)


def _abilities(folder: Path) -> Finding:
    one, two = folder / "one", folder / "two"
    one.write_bytes(b"x")
    two.write_bytes(b"y")
    lacks = [] if _locks(one) else ["locks (flock)"]
    try:
        one.replace(two)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(fd)
        os.close(fd)
    except OSError:
        lacks.append("renaming and flushing")
    if (folder / "TWO").exists():
        lacks.append("names that differ in capitals only")
    if lacks:
        hint = "put the cache on a disk of this machine: FORGE_CACHE names another place"
        return Finding("file system", f"it has no {' and no '.join(lacks)}", hint, 4)
    shares = "can" if clone(two, two.with_name("shared")) else "cannot"
    return Finding("file system", f"locks, renames and flushes; files {shares} share blocks (reflink)")


def _locks(path: Path) -> bool:
    """Say whether a lock that is held keeps a second holder out."""
    with path.open("rb") as first, path.open("rb") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def _clock(folder: Path, store: Path) -> Finding:
    """Hold the machine's clock against that of the file system, and against what was written there last."""
    before = time.time()
    (folder / "now").write_bytes(b"")
    drift = (folder / "now").stat().st_mtime - before
    hint = "set the clocks (NTP): changes right after a look could go unnoticed otherwise"
    written = [path.lstat().st_mtime for path in store.glob("*")]
    ahead = max(written, default=before) - before
    if abs(drift) <= DRIFT and ahead > DRIFT:
        return Finding("clock", f"it is {ahead:.0f} s behind what was written into the cache last", hint)
    if abs(drift) <= DRIFT:
        return Finding("clock", "file system and machine agree on the time")
    return Finding("clock", f"the file system is {drift:+.0f} s off the machine's clock", hint)


def _cache(store: Path) -> Finding:
    counts = {kind: _count(store / kind) for kind in ("objects", "results", "states", "quarantine")}
    dead = [path for path in (store / "tmp").glob("*") if is_abandoned(path)]
    text = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n or kind in ("objects", "results"))
    text += f", {len(dead)} unfinished" if dead else ""
    if counts["quarantine"]:
        hint = "`forge verify` looks at all of it; `forge clean` removes what lies in quarantine"
        return Finding("cache", text, hint)
    return Finding("cache", text, "the next build sweeps what is unfinished" if dead else "")


def _in_the_way(cache: Path) -> Iterator[Finding]:
    """Name what lies where the store has a folder, or its index, and is none: builds could not use it."""
    store = cache / LAYOUT
    places = (cache, store, *(store / name for name in FOLDERS))
    found = [place for place in places if os.path.lexists(place) and not place.is_dir()]
    found += [place for place in [store / INDEX] if place.exists() and not place.is_file()]
    hint = "move it elsewhere: the next build makes what belongs there"
    yield from (Finding("cache", f"{place} is in the way", hint, 4) for place in found)


def _count(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*")) if folder.is_dir() else 0
