"""LoRAs side by side: one LoRA that does what all of them do, to one rounding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdforge.edits import lora_merge
from sdforge.errors import InputError, UsageError
from sdforge.formula import Plan
from sdforge.run.tensors import rounded
from tests.edits.test_bake import VECTORS, baked, bits, weights
from tests.edits.test_bake_forms import kept as kept_form
from tests.families.forms import CASES, WIDE
from tests.families.loras import LINEAR, MODULES, TEXT, kept_lora, random_lora
from tests.families.loras import WIDE as CONVOLUTION
from tests.families.workbench import SD15, Taken, digest, keep, made, same_bytes


def planned(loras: list[tuple[Taken, dict[str, Any]]], dtype: str = "") -> Plan:
    table = lora_merge.TABLE.model_validate(
        {"loras": {f"l{i}": use for i, (_, use) in enumerate(loras)}, "dtype": dtype}
    )
    inputs = [replace(taken.input(**use), name=f"l{i}") for i, (taken, use) in enumerate(loras)]
    return lora_merge.plan(table, {"loras": inputs}, SD15)


def merged(work: Path, loras: list[tuple[Taken, dict[str, Any]]], dtype: str = "") -> Taken:
    plan = planned(loras, dtype)
    return keep(work, made(plan, *(taken for taken, _ in loras)), kind="lora", facts=_facts(plan))


def _facts(plan: Plan) -> dict[str, Any]:
    return {name: value for name, value in plan.facts.items() if value is not None}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merges")


@pytest.fixture(scope="module")
def first(toy: Taken, work: Path) -> Taken:
    return kept_lora(work / "first", random_lora(toy, alphas=(1.0, 2.0, 0.5)))


@pytest.fixture(scope="module")
def second(toy: Taken, work: Path) -> Taken:
    return kept_lora(work / "second", random_lora(toy, MODULES[1:], seed=1, alphas=(3.0,)))


USES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"strength": 1.0}, {"strength": 1.0}),
    ({"strength": 0.7, "text_encoder": 0.3}, {"strength": -0.4}),
    ({"strength": 0.7, "blocks": {"unet.in0?": 0.25}}, {"strength": 1.0, "mbw_preset": "MIDD"}),
]


@pytest.mark.parametrize("uses", USES)
def test_baking_the_merge_is_baking_all_of_them(
    uses: tuple[dict[str, Any], dict[str, Any]], toy: Taken, first: Taken, second: Taken, tmp_path: Path
) -> None:
    """In fp32 the one rounding of s·up is 2⁻²⁴ of each number of it."""
    pairs = list(zip((first, second), uses, strict=True))
    one = merged(tmp_path, pairs, "fp32")
    apart, together, before = baked(toy, pairs, "fp32"), baked(toy, [(one, 1.0)], "fp32"), weights(toy)
    for name, tensor in apart.items():
        change = (tensor.double() - before[name].double()).abs().max()
        assert torch.allclose(together[name].double(), tensor.double(), rtol=2**-22, atol=2**-22 * float(change)), name
    assert any(not torch.equal(apart[name].double(), before[name].double()) for name in apart)


def test_sixteen_bits_round_the_factors_once(toy: Taken, first: Taken, second: Taken, tmp_path: Path) -> None:
    """An fp16 factor is right to 2⁻¹¹, so the sum of rank products is right to a little more."""
    pairs = [(first, {"strength": 0.7}), (second, {"strength": -0.4})]
    apart, together = baked(toy, pairs, "fp32"), baked(toy, [(merged(tmp_path, pairs), 1.0)], "fp32")
    before, moved, wrong = weights(toy), 0.0, 0.0
    for name, tensor in apart.items():
        moved += float((tensor.double() - before[name].double()).square().sum())
        wrong += float((together[name].double() - tensor.double()).square().sum())
    assert 0 < wrong**0.5 < 2**-11 * moved**0.5


def test_ranks_add_up_and_alpha_is_the_rank(first: Taken, second: Taken) -> None:
    plan = planned([(first, {"strength": 1.0}), (second, {"strength": 1.0})])
    shapes = {row.tensor.name: row.tensor.shape for row in plan.components["lora"]}
    assert shapes[f"{CONVOLUTION}.lora_down"][0] == 8
    assert shapes[f"{CONVOLUTION}.lora_up"][1] == 8
    assert shapes[f"{LINEAR}.lora_down"][0] == 2  # only the first one has it
    assert _facts(plan) == {}
    assert plan.facts == {"alpha": None}


def test_a_lora_alone_at_its_own_scale_passes_through(toy: Taken, tmp_path: Path) -> None:
    """alpha is the rank, 2, and so is what is computed of it: nothing."""
    plain = kept_lora(tmp_path, random_lora(toy, (LINEAR, TEXT), alphas=(2.0,)))
    plan = planned([(plain, {"strength": 1.0})])
    assert plan.identities() == {"lora": plain.identity("lora")}
    assert plan.size() == 0


def test_a_strength_alone_is_folded_into_one_factor(toy: Taken, tmp_path: Path) -> None:
    plain = kept_lora(tmp_path / "a", random_lora(toy, (LINEAR,), alphas=(2.0,)))
    half = merged(tmp_path / "b", [(plain, {"strength": 0.5})])
    before, after = plain.tensors("lora"), half.tensors("lora")
    assert same_bytes(after[f"{LINEAR}.lora_down"], before[f"{LINEAR}.lora_down"])
    assert torch.equal(after[f"{LINEAR}.lora_up"], before[f"{LINEAR}.lora_up"] / 2)


def test_no_name_or_order_decides_the_result(first: Taken, second: Taken) -> None:
    one, two = (first, {"strength": 0.7}), (second, {"strength": -0.4})
    assert planned([one, two]).identities() == planned([two, one]).identities()


def test_what_has_strength_0_is_left_out(first: Taken) -> None:
    plan = planned([(first, {"strength": 1.0, "text_encoder": 0.0})])
    assert not any(row.tensor.name.startswith("text_encoder") for row in plan.components["lora"])
    with pytest.raises(UsageError, match="nothing is left of the LoRAs"):
        planned([(first, {"strength": 0.0})])


def differences(work: Path, seed: int, dtype: torch.dtype = torch.float32) -> Taken:
    draw = torch.Generator().manual_seed(seed)
    shapes = {f"{LINEAR}.diff": (8, 8), "unet.conv_in.diff_b": (8,), "unet.conv_norm_out.w_norm": (8,)}
    tensors = {name: torch.randn(*shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    return keep(work, {"lora": tensors}, kind="lora")


def test_whole_differences_are_added(toy: Taken, tmp_path: Path) -> None:
    one, two = differences(tmp_path / "1", 1), differences(tmp_path / "2", 2)
    pairs: list[tuple[Taken, dict[str, Any]]] = [(one, {"strength": 0.5}), (two, {"strength": 2.0})]
    sums = merged(tmp_path / "3", pairs).tensors("lora")
    for name, tensor in sums.items():
        assert torch.allclose(tensor, 0.5 * one.tensors("lora")[name] + 2 * two.tensors("lora")[name], rtol=1e-6)
    assert set(sums) == set(one.tensors("lora"))
    apart, together = baked(toy, pairs, "fp32"), baked(toy, [(keep(tmp_path / "4", {"lora": sums}, kind="lora"), 1.0)])
    assert torch.allclose(apart["unet.conv_in.bias"], together["unet.conv_in.bias"].float(), atol=1e-2)


def test_types_that_differ_become_fp32(tmp_path: Path) -> None:
    one, two = differences(tmp_path / "1", 1, torch.float16), differences(tmp_path / "2", 2, torch.bfloat16)
    plan = planned([(one, {"strength": 1.0}), (two, {"strength": 1.0})])
    assert plan.dtypes() == {"lora": "F32"}
    assert planned([(one, {"strength": 1.0})]).dtypes() == {"lora": "F16"}
    assert planned([(one, {"strength": 1.0}), (two, {"strength": 1.0})], "bf16").dtypes() == {"lora": "BF16"}


@pytest.mark.parametrize(
    ("name", "word", "hint"),
    [
        ("loha", "loha", "`resize` makes plain LoRA of it"),
        ("lokr, none whole", "lokr", "`resize` makes plain LoRA of it"),
        ("a core", "more than a lora", "`resize` makes plain LoRA of it"),
        ("dora of rows", "more than a lora", "bake it"),
        ("dora of a loha", "loha", "bake it"),
        ("glora", "glora", "bake it"),
        ("oft", "oft", "bake it"),
        ("ia3 of rows", "ia3", "bake it"),
    ],
)
def test_what_has_no_factors_is_refused_with_the_way_out(
    name: str, word: str, hint: str, toy: Taken, first: Taken, tmp_path: Path
) -> None:
    other = kept_form(tmp_path, (CONVOLUTION,), (CASES | WIDE)[name], weights(toy))
    with pytest.raises(InputError, match=f"`l1`: it changes {CONVOLUTION} as {word}, which") as caught:
        planned([(first, {"strength": 1.0}), (other, {"strength": 1.0})])
    assert hint in caught.value.hint
    assert caught.value.name == "l1"


def test_loras_of_other_widths_are_refused(first: Taken, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {f"{LINEAR}.lora_down": torch.ones(2, 12), f"{LINEAR}.lora_up": torch.ones(12, 2)}
    wide = keep(tmp_path, {"lora": tensors}, kind="lora")
    with pytest.raises(InputError) as caught:
        planned([(first, {"strength": 1.0}), (wide, {"strength": 1.0})])
    assert LINEAR in caught.value.message
    assert {f"`l{i}`" in caught.value.message for i in (0, 1)} == {True}  # which one is first their names decide
    assert "other widths" in caught.value.hint


def test_a_module_that_the_family_lacks_is_told_with_the_lora_that_has_it(first: Taken, tmp_path: Path) -> None:
    name = "unet.down_blocks.9.to_q"
    factors: dict[str, Tensor] = {f"{name}.lora_down": torch.ones(1, 8), f"{name}.lora_up": torch.ones(8, 1)}
    with pytest.raises(InputError, match=f"`l1`: it changes {name}") as caught:
        planned([(first, {"strength": 1.0}), (keep(tmp_path, {"lora": factors}, kind="lora"), {"strength": 1.0})])
    assert caught.value.name == "l1"


def merged_vector(join: str, dtype: torch.dtype) -> str:
    shapes = {"columns": ((96, 8), (96, 24)), "rows": ((8, 96, 3, 3), (24, 96, 3, 3)), "sum": ((96, 64), (96, 64))}
    tensors = [bits(dtype, *shape, seed=i + 1) for i, shape in enumerate(shapes[join])]
    return digest(rounded(join, lora_merge.compute({"join": join, "scales": [0.7, -0.05]}, tensors, dtype), dtype))


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("join", ["columns", "rows", "sum"])
def test_a_merge_gives_the_committed_bytes_whatever_the_number_of_threads(join: str, dtype: str) -> None:
    """`vectors.json`: a change of it is a change of every merged LoRA: raise the version of lora_merge."""
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    expected = json.loads(VECTORS.read_text())["lora_merge"][f"{join}, {dtype}"]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert merged_vector(join, kind) == expected
    finally:
        torch.set_num_threads(threads)
