"""Compile the kernel. Nothing of sdforge is imported here: installing runs it too."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernel.c", "sums.c"))
INCLUDED = (Path(__file__).with_name("pass.h"),)  # by one of them
LIBRARY = Path(__file__).with_name("kernel.shared")  # not `.so`, which Python takes for a module
COMPILERS = ("cc", "gcc", "clang")
# no operation is contracted with another one, so that each is rounded as torch rounds it; bits of numbers are looked at
FLAGS = ("-std=c11", "-O3", "-mavx2", "-mf16c", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC")


def fingerprint() -> str:
    """Return what names the sources as they are now."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in (*SOURCES, *INCLUDED))).hexdigest()[:16]


def build(library: Path = LIBRARY) -> str:
    """Compile the kernel; return why it could not be, or nothing."""
    if platform.machine().lower() not in ("x86_64", "amd64") or os.name != "posix":
        return "it is written for x86-64 processors, and for Linux and macOS"
    chosen = os.environ.get("CC", "").split() or [found for name in COMPILERS if (found := shutil.which(name))][:1]
    if not chosen:
        return f"no C compiler was found ({', '.join(COMPILERS)})"
    new = library.with_name(f".{library.name}.{os.getpid()}")
    command = [*chosen, *FLAGS, f'-DSOURCE="{fingerprint()}"', "-o", str(new), *map(str, SOURCES)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return f"{chosen[0]} said: {last}"
        new.replace(library)
    except OSError as error:
        return f"{error.strerror} ({error.filename or chosen[0]})"
    finally:
        new.unlink(missing_ok=True)
    return ""
