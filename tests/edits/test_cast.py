"""Casting: every number rounded to the nearest, ties to even, or the build stops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdforge.edits import cast
from sdforge.errors import ActionFailed
from sdforge.formula import Plan
from sdforge.run.tensors import TOO_LARGE, rounded
from tests.families.workbench import SD15, Taken, keep, made, same_bytes

NAME = "conv_in.weight"


def planned(base: Taken, dtype: str) -> Plan:
    table = cast.Cast.model_validate({"checkpoint": "base", "dtype": dtype})
    return cast.plan(table, {"checkpoint": [base.input()]}, SD15)


def recast(work: Path, tensor: Tensor, dtype: str) -> Tensor:
    base = keep(work, {"unet": {NAME: tensor}})
    return made(planned(base, dtype), base)["unet"][NAME]


def test_a_cast_to_the_type_it_has_changes_no_name(toy: Taken) -> None:
    plan = planned(toy, "fp16")
    assert plan.identities() == {part: toy.identity(part) for part in ("unet", "text_encoder", "vae")}
    assert plan.size() == 0


def test_all_networks_are_cast(toy: Taken) -> None:
    plan = planned(toy, "bf16")
    assert plan.dtypes() == {"unet": "BF16", "text_encoder": "BF16", "vae": "BF16"}
    result = made(plan, toy)
    assert all(torch.equal(t, toy.tensors("vae")[name].bfloat16()) for name, t in list(result["vae"].items())[:20])


def test_to_fp32_and_back_is_the_same_bytes(toy: Taken, tmp_path: Path) -> None:
    wide = keep(tmp_path, made(planned(toy, "fp32"), toy))
    back = made(planned(wide, "fp16"), wide)
    before = toy.tensors("text_encoder")
    assert all(same_bytes(tensor, before[name]) for name, tensor in back["text_encoder"].items())


@pytest.mark.parametrize(
    ("value", "half"),
    [
        (1 + 2**-11, 1.0),  # a tie goes to the even one
        (1 + 3 * 2**-11, 1 + 2 * 2**-10),
        (65519.0, 65504.0),
        (2**-25, 0.0),
        (2**-25 * 1.0001, 2**-24),
        (-0.0, -0.0),
    ],
)
def test_numbers_are_rounded_to_the_nearest_with_ties_to_even(value: float, half: float, tmp_path: Path) -> None:
    result = recast(tmp_path, torch.tensor([value]), "fp16")
    assert same_bytes(result, torch.tensor([half]).half())


@pytest.mark.parametrize(("value", "dtype"), [(65520.0, "fp16"), (-1e38, "fp16"), (3.4e38, "bf16"), (1e39, "fp32")])
def test_what_does_not_fit_stops_with_the_tensors_name(value: float, dtype: str, tmp_path: Path) -> None:
    kind = torch.float64 if abs(value) > 3.5e38 else torch.float32
    if kind is torch.float64 or dtype != "bf16":
        with pytest.raises(ActionFailed, match=r"unet\.conv_in\.weight"):
            recast(tmp_path, torch.tensor([value], dtype=kind), dtype)
    else:
        with pytest.raises(ActionFailed, match="which does not fit into bfloat16"):
            recast(tmp_path, torch.tensor([value], dtype=kind), dtype)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_fits_is_told_from_what_does_not_to_the_last_fp32_number(dtype: torch.dtype, sign: int) -> None:
    """Where it does not, the type itself rounds to Inf."""
    fits = torch.nextafter(torch.tensor(TOO_LARGE[dtype]), torch.tensor(0.0)) * sign
    other = torch.zeros(70_000)  # more than is rounded at a time
    for place in (0, 69_999):
        other[place] = fits
        assert rounded("x", other, dtype)[place] == torch.finfo(dtype).max * sign
        other[place] = TOO_LARGE[dtype] * sign
        assert other.to(dtype)[place].isinf()
        with pytest.raises(ActionFailed, match=r"x holds .*, which does not fit"):
            rounded("x", other, dtype)
        other[place] = torch.nan
        with pytest.raises(ActionFailed, match="x holds NaN or Inf"):
            rounded("x", other, dtype)
        other[place] = 0


def test_integers_stay_what_they_are(tmp_path: Path) -> None:
    assert same_bytes(recast(tmp_path, torch.arange(5), "fp16"), torch.arange(5))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.floats(-60000, 60000, width=32))
def test_rounding_twice_is_rounding_once(value: float) -> None:
    x = torch.tensor([value])
    once = rounded("x", x, torch.float16)
    assert same_bytes(rounded("x", once.double(), torch.float16), once)
    assert abs(float(once) - value) <= max(abs(value) * 2**-11, 2**-25)


def test_parts_can_have_types_of_their_own(toy: Taken) -> None:
    table = cast.Cast.model_validate({"checkpoint": "base", "dtype": "bf16", "vae": "fp32", "text_encoder": "fp16"})
    plan = cast.plan(table, {"checkpoint": [toy.input()]}, SD15)
    assert plan.dtypes() == {"unet": "BF16", "text_encoder": "F16", "vae": "F32"}
    assert plan.identities()["text_encoder"] == toy.identity("text_encoder")
    result = made(plan, toy)
    assert all(torch.equal(t, toy.tensors("vae")[name].float()) for name, t in list(result["vae"].items())[:20])


def test_a_type_of_both_text_encoders_is_stated_once() -> None:
    table = cast.Cast.model_validate({"checkpoint": "base", "dtype": "fp16", "text_encoder": "fp32"})
    types = {c: table.of(c) for c in ("unet", "text_encoder", "text_encoder_2", "vae", "image_encoder")}
    assert types == {
        "unet": "fp16",
        "text_encoder": "fp32",
        "text_encoder_2": "fp32",
        "vae": "fp16",
        "image_encoder": "fp16",
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stops_with_the_tensors_name(value: float, tmp_path: Path) -> None:
    with pytest.raises(ActionFailed, match=r"conv_in\.weight"):
        recast(tmp_path, torch.tensor([1.0, value]), "fp16")
