"""The toy checkpoints of the families' tests serve here too."""

from tests.families.conftest import other, toy, toys

__all__ = ["other", "toy", "toys"]
