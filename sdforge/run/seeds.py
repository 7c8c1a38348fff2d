"""Random numbers that depend on (seed, purpose, step) alone: never on the global generator, order or resuming."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, step: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator for one purpose at one step. Drawn on the CPU, numbers do not depend on the device."""
    digest = hashlib.sha256(f"sdforge.{purpose}\0{seed}\0{step}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
