"""Merges at full size: checkpoints to merge, and what merges them beside forge."""
