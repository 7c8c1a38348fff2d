"""Steering a text encoder towards pictures: a few steps on the angle between what it says and an aesthetic.

Gallego 2022 (https://arxiv.org/abs/2209.12330). Shapes in names: B prompts, L tokens, W width of the text, D width of
the space that CLIP's pictures and texts share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdforge.errors import ActionFailed


class Aesthetic(NamedTuple):
    """Towards what, and how far: T steps of Adam. projection_DW: from the text encoder's last state to CLIP's space."""

    vector_D: Tensor
    projection_DW: Tensor
    steps: int
    learning_rate: float

    @staticmethod
    def of(tensors: dict[str, Tensor], facts: dict[str, Any]) -> Aesthetic:
        """Return what an artifact says."""
        vector_D, projection_DW = tensors["vector"].float(), tensors["text_projection"].float()
        return Aesthetic(vector_D, projection_DW, int(facts["steps"]), float(facts["learning_rate"]))


def cosines(encoder: Any, ids_BL: Tensor, end: int, aesthetic: Aesthetic) -> Tensor:
    """Return the cosine (B) of what every prompt says with the aesthetic; read where the prompt ends, padding behind.

    end: the number of the token that ends a prompt.
    """
    states_BLW = encoder(input_ids=ids_BL).last_hidden_state
    ends_B = (ids_BL == end).int().argmax(1)
    said_BD = states_BLW[torch.arange(len(ids_BL), device=ids_BL.device), ends_B] @ aesthetic.projection_DW.T
    return functional.cosine_similarity(said_BD, aesthetic.vector_D[None])


def steer(encoder: nn.Module, ids_BL: Tensor, end: int, aesthetic: Aesthetic) -> Iterator[float]:
    """Change a text encoder (fp32) in place, a step at a time; yield the mean cosine before each step, and at last.

    All its parameters are trained; of the token table only rows of the prompts move. Raises ActionFailed for NaN.
    """
    parameters = list(encoder.parameters())
    optimizer = torch.optim.Adam(parameters, aesthetic.learning_rate)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        for step in range(aesthetic.steps + 1):
            with torch.enable_grad():
                mean = cosines(encoder, ids_BL, end, aesthetic).mean()
                if not bool(torch.isfinite(mean)):
                    raise ActionFailed(
                        f"the cosine became {float(mean)} at step {step}", hint="a smaller learning_rate"
                    )
                yield float(mean.detach())
                if step < aesthetic.steps:
                    optimizer.zero_grad()
                    (-mean).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


@contextmanager
def steered(encoder: nn.Module, ids_BL: Tensor, end: int, aesthetic: Aesthetic) -> Iterator[None]:
    """Steer a text encoder, in fp32, and put it back as it was."""
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    dtype = next(encoder.parameters()).dtype
    encoder.float()
    try:
        for _ in steer(encoder, ids_BL, end, aesthetic):
            pass
        yield
    finally:
        encoder.to(dtype)
        encoder.load_state_dict(before)
