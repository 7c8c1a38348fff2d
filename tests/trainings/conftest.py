"""The toy checkpoints and drawings of the worker's tests serve here too."""

from tests.families.conftest import other, toy, toys
from tests.run.conftest import drawings, pictures

__all__ = ["drawings", "other", "pictures", "toy", "toys"]
