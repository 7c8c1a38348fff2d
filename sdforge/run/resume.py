"""Between a training at work and what is kept of it: its numbers, and those that its optimiser goes on with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdforge.errors import ActionFailed
from sdforge.run.optimizers import Average, progress_of
from sdforge.run.states import State, Table
from sdforge.run.tensors import DTYPES, NAMES, raw

Parameters = dict[str, nn.Parameter]


def taken_down(
    step: int, parameters: Parameters, optimizer: torch.optim.Optimizer, average: Average | None
) -> tuple[Table, dict[str, Any]]:
    """Return the tensors of a state (`NAME.PART`), and what of the optimiser's is no tensor.

    Raises ActionFailed for a number that is not finite: such a state would never be any good.
    """
    tensors: Table = {}
    plain: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        rows: dict[str, Any] = {"value": parameter, **optimizer.state.get(parameter, {})}
        if average:
            rows["average"] = average.values[name]
        for part, value in rows.items():
            if not isinstance(value, Tensor):
                plain.setdefault(name, {})[part] = value
                continue
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ActionFailed(f"{name} became NaN or Inf before step {step}", hint="a smaller learning_rate")
            tensors[f"{name}.{part}"] = (NAMES[value.dtype], tuple(value.shape), raw(value))
    return tensors, {"groups": progress_of(optimizer), "values": plain}


@torch.no_grad()
def put_back(state: State, parameters: Parameters, optimizer: torch.optim.Optimizer, average: Average | None) -> None:
    """Let parameters, optimiser and average be what `taken_down` found. state: its notes have `optimizer`."""
    kept = state.notes.get("optimizer", {"groups": [], "values": {}})
    for group, values in zip(optimizer.param_groups, kept["groups"], strict=False):
        group |= values
    parts: dict[str, list[str]] = {}
    for full in state.tensors:
        name, _, part = full.rpartition(".")
        parts.setdefault(name, []).append(part)
    for name, parameter in parameters.items():
        # one after the other: all of them together are several times as large as the weights
        found = {part: _tensor(*state.tensors[f"{name}.{part}"]).to(parameter.device) for part in parts.get(name, [])}
        parameter.copy_(found.pop("value"))
        if average:
            average.values[name].copy_(found.pop("average"))
        if found or name in kept["values"]:
            optimizer.state[parameter] = {**found, **kept["values"].get(name, {})}


def _tensor(dtype: str, shape: tuple[int, ...], data: bytes | memoryview) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).reshape(shape)
