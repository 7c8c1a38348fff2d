"""Long runs that may be interrupted: states on disk, seeds per step, calm lines of progress."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path


def device() -> torch.device:
    """Return the first CUDA device if there is one, else one CPU thread."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    return torch.device("cpu")


def say(text: str) -> None:
    """One line, at once."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def save_state(path: Path, state: Any) -> None:
    """Write a state whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def load_state(path: Path) -> Any:
    """Return a state that `save_state` wrote, or None."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def generator(seed: int, step: int) -> torch.Generator:
    """Randomness of one step: a resumed run sees what an uninterrupted one would have seen."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def cosine_tail(share: float, *, flat: float, floor: float) -> float:
    """Factor of the learning rate: 1 until the share `flat` of the run, then half a cosine down to `floor`."""
    if share <= flat:
        return 1.0
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (share - flat) / (1 - flat)))


class Clock:
    """CPU seconds of this process and of those before it that worked at the same run."""

    def __init__(self, before: float = 0.0) -> None:
        self._start = time.process_time() - before
        self._saved = time.monotonic()

    def seconds(self) -> float:
        """CPU seconds so far."""
        return time.process_time() - self._start

    def time_to_save(self, every: float = 180.0) -> bool:
        """Return true once in `every` wall seconds."""
        if time.monotonic() - self._saved < every:
            return False
        self._saved = time.monotonic()
        return True
