"""LoRA files of every kind for a checkpoint's shapes, of random numbers: `write_adapter`."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd, prod
from pathlib import Path
from typing import Any

import torch

from benchmarks.merging.files import DRAWN, Shapes, numbers
from sdforge.families import Family, family
from sdforge.formats.kohya import kohya_tensors
from sdforge.formats.safetensors import write_file

Shape = tuple[int, ...]
Factors = dict[str, Shape]
SMALL = 0.002  # standard deviation of what is changed, so that no fp16 number overflows
EDGE = 16  # of the first factor of a LoKr, at most


def _low_rank(weight: Shape, rank: int) -> Factors:
    return {"lora_up": (weight[0], rank), "lora_down": (rank, *weight[1:])}


def _tucker(weight: Shape, rank: int) -> Factors:
    if len(weight) < 4 or weight[2:] == (1, 1):
        return _low_rank(weight, rank)
    return {
        "lora_up": (weight[0], rank),
        "lora_mid": (rank, rank, *weight[2:]),
        "lora_down": (rank, weight[1]),
    }


def _hadamard(weight: Shape, rank: int) -> Factors:
    sides = {"a": (weight[0], rank), "b": (rank, prod(weight[1:]))}
    return {f"hada_w{i}_{side}": shape for i in "12" for side, shape in sides.items()}


def _hadamard_tucker(weight: Shape, rank: int) -> Factors:
    if len(weight) < 4 or weight[2:] == (1, 1):
        return _hadamard(weight, rank)
    sides = {"t{i}": (rank, rank, *weight[2:]), "w{i}_a": (rank, weight[0]), "w{i}_b": (rank, weight[1])}
    return {f"hada_{side.format(i=i)}": shape for i in "12" for side, shape in sides.items()}


def _kronecker(weight: Shape, rank: int) -> Factors:
    out, inner = gcd(weight[0], EDGE), gcd(weight[1], EDGE)
    second = weight[0] // out, weight[1] // inner, *weight[2:]
    return {
        "lokr_w1": (out, inner),
        "lokr_w2_a": (second[0], rank),
        "lokr_w2_b": (rank, prod(second[1:])),
    }


def _kronecker_whole(weight: Shape, rank: int) -> Factors:  # noqa: ARG001 -- one signature for all kinds
    out, inner = gcd(weight[0], EDGE), gcd(weight[1], EDGE)
    return {"lokr_w1": (out, inner), "lokr_w2": (weight[0] // out, weight[1] // inner, *weight[2:])}


def _dora_rows(weight: Shape, rank: int) -> Factors:
    return _low_rank(weight, rank) | {"dora_scale": (weight[0], 1)}


def _dora_columns(weight: Shape, rank: int) -> Factors:
    return _low_rank(weight, rank) | {"dora_scale": (1, weight[1])}


def _general(weight: Shape, rank: int) -> Factors:
    return {"a1": (weight[1], rank), "a2": (rank, weight[1]), "b1": (weight[0], rank), "b2": (rank, *weight[1:])}


def _rotation(weight: Shape, rank: int) -> Factors:
    edge = gcd(weight[0], rank)
    return {"oft_blocks": (weight[0] // edge, edge, edge)}


def _butterfly(weight: Shape, rank: int) -> Factors:
    edge = gcd(weight[0], rank)
    steps = ((weight[0] // edge) & -(weight[0] // edge)).bit_length()  # as often as rows can lie twice as far apart
    return {"oft_blocks": (steps, weight[0] // edge, edge, edge)}


def _scaled(weight: Shape, rank: int) -> Factors:  # noqa: ARG001
    return {"ia3": (weight[0], 1)}


def _whole(weight: Shape, rank: int) -> Factors:  # noqa: ARG001
    return {"diff": weight}


# kind → the factors of a module, from the shape of its weight (out, in[, k, k]) and a rank
KINDS: dict[str, Callable[[Shape, int], Factors]] = {
    "LoRA, LoCon": _low_rank,
    "LoCon, Tucker": _tucker,
    "LoHa": _hadamard,
    "LoHa, Tucker": _hadamard_tucker,
    "LoKr": _kronecker,
    "LoKr, whole": _kronecker_whole,
    "DoRA, rows": _dora_rows,
    "DoRA, columns": _dora_columns,
    "GLoRA": _general,
    "OFT": _rotation,
    "BOFT": _butterfly,
    "IA3": _scaled,
    "differences": _whole,
    "norms": _whole,
}
RANKLESS = {"LoKr, whole", "IA3", "differences", "norms"}


def write_adapter(path: Path, name: str, shapes: Shapes, kind: str, rank: int) -> int:
    """Write a file as kohya's scripts or LyCORIS name it, fp16; return how many modules it changes.

    shapes: (component, canonical name) → shape of the tensors that are changed, where they belong to a module of a
    LoRA. kind: one of KINDS; "norms" are differences of all norms. rank: of OFT and BOFT the edge of a block.
    """
    of_family = family(name)
    factors = {}
    for (component, tensor), shape in shapes.items():
        module, _, part = f"{component}.{tensor}".rpartition(".")
        for factor, size in _of_tensor(of_family, module, part, shape, kind, rank).items():
            factors[f"{module}.{factor}"] = ("F16", size)
    file = kohya_tensors(of_family, factors, {})
    drawn = numbers(99, SMALL).half()
    drawn = torch.cat([drawn, drawn])
    ones = torch.ones(max((prod(s) for n, (_, s) in factors.items() if n.endswith("dora_scale")), default=0)).half()

    def content(key: str) -> list[Any]:
        if key in file.constant:
            return [file.constant[key]]
        size = prod(file.shapes[key][1])
        start = 104_729 * len(key) % DRAWN
        part = ones[:size] if key.endswith("dora_scale") else drawn[start : start + size]
        return [memoryview(part.view(torch.uint8).numpy())]  # type: ignore[arg-type]

    write_file(path, file.shapes, content, {"ss_network_module": "lycoris.kohya"})
    return len({name.rpartition(".")[0] for name in factors})


def _of_tensor(found: Family, module: str, part: str, shape: Shape, kind: str, rank: int) -> Factors:
    """Return what a kind keeps of a module for one of its tensors, its weight or its bias."""
    if kind == "norms":
        return {{"weight": "w_norm", "bias": "b_norm"}[part]: shape} if module in found.norms() else {}
    if module not in found.modules():
        return {}
    if part == "bias":
        return {"diff_b": shape} if kind == "differences" else {}
    return KINDS[kind](shape, rank)
