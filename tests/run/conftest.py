"""The toy checkpoints of the families' tests, and three drawings to learn from."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdforge.order import Given
from tests.families.conftest import other, toy, toys
from tests.run.order import dataset
from tests.toys import write_drawings

__all__ = ["other", "toy", "toys"]


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawings")
    write_drawings(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(drawings: Path) -> Given:
    return dataset(drawings)
