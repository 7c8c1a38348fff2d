"""The toy checkpoints of the families' tests serve here too, and the planner's made-up project."""

from pathlib import Path

import pytest

from tests.families.conftest import other, toy, toys
from tests.planner.conftest import World, toy_world

__all__ = ["other", "toy", "toys"]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return toy_world(tmp_path)
