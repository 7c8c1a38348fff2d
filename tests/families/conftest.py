"""Toy checkpoints: `toy` and `other` are random and of one shape; `each` is one of every family."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.toys import TOYS, write_family
from tests.families.workbench import Taken, take, write_toy


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the toys of this session lie, whichever tests ask for them."""
    return tmp_path_factory.getbasetemp() / "toys"


@pytest.fixture(scope="session")
def toy(toys: Path) -> Taken:
    return take(write_toy(toys / "toy", seed=1))


@pytest.fixture(scope="session", params=TOYS)
def each(request: pytest.FixtureRequest, toys: Path) -> Taken:
    """The toy of every family in turn."""
    return take(write_family(toys / ("toy" if request.param == "sd15" else request.param), request.param))


@pytest.fixture(scope="session")
def other(toys: Path) -> Taken:
    return take(write_toy(toys / "other", seed=2))
