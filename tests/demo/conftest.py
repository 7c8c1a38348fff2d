"""The shipped bases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from demo.bases import Base, read_base

BASES = Path(__file__).parents[2] / "recipes" / "bases"


@pytest.fixture(scope="session")
def bases() -> dict[str, Base]:
    """Both bases by name, on one thread."""
    torch.set_num_threads(1)
    return {name: read_base(BASES / name) for name in ("flat", "ink")}
