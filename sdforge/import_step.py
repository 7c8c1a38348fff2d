"""What cannot be read where it lies is converted to safetensors once, by a limited process.

Pickles, pictures that carry an embedding, fp8 weights with scales beside them. See `run.import_step` for what that
process may do. Here it is started, watched, and its refusal told.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

from sdforge.errors import ResourceError, UsageError
from sdforge.formats.pickled import is_pickle
from sdforge.formats.safetensors import read_header
from sdforge.formats.single_file import is_scaled
from sdforge.pictures import PICTURES
from sdforge.store.files import open_regular

VERSION = 1  # raised when a file is converted to other tensors, names or metadata
PATIENCE, PACE = 120, 5 << 20  # seconds, and bytes of the file for one second more
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
INHERITED = ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "HOME")  # and nothing that is secret
HOUSE = str(Path(__file__).parents[1])  # where this very code lies
UNUSABLE = "it is damaged, or made to do harm; get it again from where it came from, best as safetensors"


What = Literal["pickle", "picture", "scaled"]


def needs_import(path: Path) -> What | None:
    """Say as what a file must be imported before it can be read; None for what is read where it lies."""
    if path.suffix.lower() in PICTURES:
        return "picture"
    if is_pickle(path):
        return "pickle"
    return "scaled" if is_scaled(read_header(path)) else None


def import_file(path: Path, into: Path, what: What) -> None:
    """Convert a file. Raises UsageError for what holds no tensors or more than numbers, ResourceError without room."""
    os.close(open_regular(path))  # refuses what is no file before anybody waits for it
    # -P: modules are not looked for in the folder that the person is in
    command = [sys.executable, "-P", "-m", "sdforge.run.import_step", str(path.absolute()), str(into.absolute()), what]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=_environment(),
            timeout=PATIENCE + path.stat().st_size / PACE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        into.unlink(missing_ok=True)
        raise UsageError(f"{path} takes longer to convert than a file of its size should", hint=UNUSABLE) from None
    if done.returncode == 0 and into.is_file():
        return
    into.unlink(missing_ok=True)
    if done.returncode == UsageError.exit_code and done.stdout:
        sentence, _, hint = done.stdout.strip().partition("\n")
        raise UsageError(sentence, hint or UNUSABLE)
    if "No space left" in done.stderr:
        raise ResourceError(f"{path} could not be converted: the disk is full", hint="make room, and try again")
    last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    raise UsageError(f"{path} could not be converted: {last[0][:200]}", hint=UNUSABLE)


def _environment() -> dict[str, str]:
    """Return what the process is told: where programs and this code lie."""
    paths = [HOUSE, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    own = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return own | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(str(Path(p).absolute()) for p in paths)}
