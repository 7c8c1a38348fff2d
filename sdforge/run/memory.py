"""How a training fits into a device's memory: micro-batch, checkpointing, offload. None of it changes what is learned.

A step of `batch` pictures may be computed in parts whose gradients add up, activations may be computed a second time
instead of being kept, and networks that no step runs may wait in the computer's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdforge.errors import ResourceError

RESERVE = 0.1  # share of the budget that is left to workspaces and fragmentation


class Choice(NamedTuple):
    """What was chosen: pictures computed at once, whether activations are computed twice, what waits off the device."""

    micro_batch: int
    checkpointing: bool
    offload: bool

    def __str__(self) -> str:
        parts = [f"micro-batch {self.micro_batch}"]
        parts += ["gradient checkpointing"] if self.checkpointing else []
        parts += ["text encoders and VAE off the device"] if self.offload else []
        return ", ".join(parts)


def choose(budget: int, fixed: int, idle: int, picture: int, checkpointed: int, batch: int) -> Choice:
    """Choose how to fit a training into `budget` bytes, the fastest way first. Raises ResourceError.

    fixed: bytes of weights, gradients and the optimiser's memory; idle: bytes of networks that no step runs, counted
    in neither; picture, checkpointed: bytes that the backward pass of one picture needs, without and with
    checkpointing; batch: pictures of a step.
    """
    room = int(budget * (1 - RESERVE)) - fixed
    for each, checkpointing in ((picture, False), (checkpointed, True)):
        for offload in (False, True):
            left = room - (0 if offload else idle)
            if left >= each * batch:
                return Choice(batch, checkpointing, offload)
        most = room // each if each else batch
        if most >= max(1, min(batch, 4)):  # smaller parts than four cost more than checkpointing
            return Choice(_part(batch, most), checkpointing, True)
    most = room // checkpointed if checkpointed else batch
    if most < 1:
        needed = int((fixed + checkpointed) / (1 - RESERVE)) + 1
        raise ResourceError(
            f"{budget / 1e9:.3g} GB are too little: one picture at a time needs about {needed / 1e9:.3g} GB",
            hint="a smaller resolution, or a device with more memory",
        )
    return Choice(_part(batch, most), True, True)


def _part(batch: int, most: int) -> int:
    """Return the size of the fewest equal parts of at most `most` pictures."""
    parts = -(-batch // most)
    return -(-batch // parts)


def kept_bytes(run: Callable[[], Tensor], own: Iterable[Tensor]) -> int:
    """Return the bytes that a computation keeps for its backward pass, without those of `own` (weights)."""
    known = {t.untyped_storage().data_ptr() for t in own}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    del loss
    return sum(kept.values())


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def set_checkpointing(networks: Iterable[nn.Module], *, on: bool) -> None:
    """Let networks that can compute activations a second time do so, or keep them again."""
    for network in networks:
        change: Any = getattr(
            network, "enable_gradient_checkpointing" if on else "disable_gradient_checkpointing", None
        )
        if change is not None:
            change()
