"""What a formula holds while it is made: parts of tensors where it can be made in parts, and nothing that is done."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from sdforge.order import Computation, Order, Outcome
from sdforge.ref import Ref
from sdforge.run.formula import run_formula
from tests.families.workbench import keep, reference
from tests.merges.test_merge_contract import ELEMENTWISE, count, settings
from tests.peak import holds_less, peak

SHAPE, RANK = (2048, 4096), 4
WIDE = 4 * prod(SHAPE)  # bytes of one tensor in fp32, the narrowest type that is computed in; parts take half
SMALL = (256, 1024)
FACTORS = {"up": (SHAPE[0], RANK), "down": (RANK, SHAPE[1]), "rows": (SHAPE[0], 1)}
HALVES = dict.fromkeys(("left", "right"), (SHAPE[0], SHAPE[1] // 2))
BAKES = {  # form → its factors, by name and by tensor
    "lora": {"lora_up": "up", "lora_down": "down"},
    "dora": {"lora_up": "up", "lora_down": "down", "dora_scale": "rows"},
    "loha": {"hada_w1_a": "up", "hada_w1_b": "down", "hada_w2_a": "up", "hada_w2_b": "down"},
    "ia3": {"ia3": "rows"},
    "diff": {"diff": "1"},
}


@pytest.fixture(scope="module")
def refs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ref]:
    """Four large tensors, factors for their shape, halves of it, and two small ones."""
    draw = torch.Generator().manual_seed(4)
    shapes = {str(i): SHAPE for i in range(4)} | FACTORS | HALVES | {f"small {i}": SMALL for i in range(2)}
    tensors = {name: torch.randn(shape, generator=draw).half() for name, shape in shapes.items()}
    kept = keep(tmp_path_factory.mktemp("tensors"), {"unet": tensors})
    return {tensor.name: reference(tensor, kept.files) for tensor in kept.tables["unet"]}


def of(refs: dict[str, Ref], name: str, method: str, parameters: dict[str, Any], *tensors: str) -> Computation:
    return Computation("unet", name, "F16", refs[tensors[0]].shape, method, parameters, tuple(refs[t] for t in tensors))


def bake(refs: dict[str, Ref], form: str) -> Computation:
    factors = BAKES[form]
    own = {"form": "lora" if form == "dora" else form, "factors": list(factors), "scale": 0.5, "strength": 0.5}
    updates = {"updates": [["lora", len(factors), own | {"limit": 0.0}]]}
    return of(refs, "x", "bake", updates, "0", *factors.values())


def making(work: Path, *made: Computation) -> Callable[[], Outcome]:
    """Return what runs an order that computes some tensors."""
    order = Order("", "", "weighted_sum", "merges", "sd15", {}, str(work), compute=list(made))
    return lambda: run_formula(order, lambda **_: None)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_an_elementwise_merge_holds_no_whole_tensor(name: str, refs: dict[str, Ref], tmp_path: Path) -> None:
    tensors = [str(i) for i in range(count(name))]
    assert holds_less(making(tmp_path, of(refs, "x", name, settings(name), *tensors)), WIDE)


@pytest.mark.parametrize("form", BAKES)
def test_a_bake_that_goes_row_by_row_holds_no_whole_weight(form: str, refs: dict[str, Ref], tmp_path: Path) -> None:
    assert holds_less(making(tmp_path, bake(refs, form)), WIDE)


def test_a_chain_in_one_pass_holds_none_of_what_is_made_on_the_way(refs: dict[str, Ref], tmp_path: Path) -> None:
    difference = of(refs, "x", "add_difference", {"weight": 0.5}, "1", "2", "3")
    last = of(refs, "x", "weighted_sum", {"weights": [0.5, 0.5]}, "0", "1")
    assert holds_less(making(tmp_path, last._replace(inputs=(bake(refs, "lora"), difference))), WIDE)


@pytest.mark.parametrize(("join", "first", "second"), [("columns", "left", "right"), ("sum", "0", "1")])
def test_loras_side_by_side_or_added_hold_no_whole_factor(
    join: str, first: str, second: str, refs: dict[str, Ref], tmp_path: Path
) -> None:
    merged = of(refs, "x", "lora_merge", {"join": join, "scales": [0.5, 2.0]}, first, second)
    assert holds_less(making(tmp_path, merged._replace(shape=SHAPE)), WIDE)


def test_what_is_made_is_not_kept(refs: dict[str, Ref], tmp_path: Path) -> None:
    """Of sixteen tensors more, each of which is needed whole, not even half of what they take as fp16."""
    some = [of(refs, str(i), "slerp", settings("slerp"), "small 0", "small 1") for i in range(24)]
    few = peak(making(tmp_path, *some[:8]))
    assert holds_less(making(tmp_path, *some), few + 16 * 2 * prod(SMALL) // 2)
