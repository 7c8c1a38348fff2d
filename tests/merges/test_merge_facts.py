"""Numbers that a reader can check by hand: facts T1 … T39 of the reference on merge methods."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdforge.exact import complement
from sdforge.merges.add_difference import add_difference
from sdforge.merges.add_difference import simplify as simplify_difference
from sdforge.merges.slerp import simplify as simplify_slerp
from sdforge.merges.slerp import slerp
from sdforge.merges.weighted_sum import simplify as simplify_sum
from sdforge.merges.weighted_sum import weighted_sum
from sdforge.run.tensors import rounded

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
NUMBERS = st.floats(-1e6, 1e6, width=32)


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


A, B, C = vector(1, 2, -3, 0.5), vector(3, -2, 1, 0.5), vector(0, 1, -1, 0.5)


def near(tensor: Tensor, *numbers: float) -> bool:
    """Within two units in the last place."""
    expected = vector(*numbers)
    return bool(((tensor - expected).abs() <= 2 * np.finfo(np.float64).eps * expected.abs()).all())


def test_t1_a_quarter_of_the_way() -> None:
    assert weighted_sum(A, B, weights=[0.75, 0.25]).tolist() == [1.5, 1, -2, 0.5]


@pytest.mark.parametrize("share", [0.1, 0.3, 1 / 3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_t2_a_checkpoint_merged_with_itself_is_itself(share: float, dtype: torch.dtype) -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    for weights in ([complement(share), share], [share, complement(share)]):
        assert torch.equal(weighted_sum(x, x.clone(), weights=weights), x)


def test_t2_needs_the_line_since_two_products_miss() -> None:
    assert 0.7 * 0.1 + 0.3 * 0.1 != 0.1
    assert weighted_sum(vector(0.1), vector(0.1), weights=[0.7, 0.3]).tolist() == [0.1]


@pytest.mark.parametrize(("a", "b"), [(1e16, 1.0), (1e8, 0.1)])
def test_t3_both_ends_of_the_line_are_exact(a: float, b: float) -> None:
    assert weighted_sum(vector(a), vector(b), weights=[0.0, 1.0]).tolist() == [b]
    assert weighted_sum(vector(a), vector(b), weights=[1.0, 0.0]).tolist() == [a]
    assert slerp(vector(a), vector(b), weight=1.0).tolist() == [b]


def test_t4_half_of_a_difference() -> None:
    assert add_difference(A, B, C, weight=0.5).tolist() == [2.5, 0.5, -2, 0.5]


def test_t5_three_checkpoints() -> None:
    assert weighted_sum(A, B, C, weights=[0.25, 0.25, 0.5]).tolist() == [1, 0.5, -1, 0.5]


def test_weights_need_not_sum_to_one() -> None:
    assert weighted_sum(A, B, weights=[1.0, 1.0]).tolist() == [4, 0, -2, 1]
    assert weighted_sum(A, weights=[2.0]).tolist() == [2, 4, -6, 1]
    assert weighted_sum(A, B, weights=[1.5, -0.5]).tolist() == [0, 4, -5, 0.5]


def test_six_three_and_one_tenth_are_one_as_they_are_written() -> None:
    assert 0.6 + 0.3 + 0.1 != 1
    assert simplify_sum(["a", "a", "a"], {"weights": [0.6, 0.3, 0.1]}) == "a"
    assert simplify_sum(["a", "a"], {"weights": [0.6, 0.3]}) != "a"


def test_t8_a_quarter_turn() -> None:
    half = math.sqrt(0.5)
    assert near(slerp(vector(1, 0), vector(0, 1), weight=0.5), half, half)
    assert near(slerp(vector(1, 0), vector(0, 1), weight=1 / 3), 0.8660254037844387, 0.5)


def test_t9_lengths_stay_as_they_are() -> None:
    assert near(slerp(vector(1, 0), vector(0, 2), weight=0.5), 0.7071067811865475, 1.414213562373095)


def test_t10_nearly_parallel_vectors_are_joined_by_a_line() -> None:
    assert slerp(vector(1, 0), vector(1, 0.01), weight=0.5).tolist() == [1, 0.005]
    assert slerp(vector(1, 0), vector(1, 0.01), weight=0.5, parallel=0.99999).tolist() != [1, 0.005]


def test_opposite_vectors_are_joined_by_a_line() -> None:
    assert slerp(vector(1, 0), vector(-1, 0), weight=0.25).tolist() == [0.5, 0]


def test_slerp_with_nothing_is_a_line() -> None:
    assert slerp(vector(0, 0), vector(2, 4), weight=0.25).tolist() == [0.5, 1]


def test_t31_numbers_are_rounded_by_way_of_fp32() -> None:
    x = vector(1 + 2**-11 + 2**-30)
    assert float(np.float16(x.numpy()[0])) == 1.0009765625
    assert rounded("x", x, torch.float16).tolist() == [1.0]


def test_t39_equal_zeros_keep_their_sign() -> None:
    assert simplify_sum(["minus zero", "minus zero"], {"weights": [0.7, 0.3]}) == "minus zero"


def test_the_identities_of_weighted_sum() -> None:
    assert simplify_sum(["a", "b"], {"weights": [1.0, 0.0]}) == "a"
    assert simplify_sum(["a", "b"], {"weights": [0.0, 1.0]}) == "b"
    assert simplify_sum(["a", "b", "c"], {"weights": [0.0, 1.0, 0.0]}) == "b"
    assert simplify_sum(["a", "b", "a"], {"weights": [0.5, 0.0, 0.5]}) == "a"
    assert simplify_sum(["a", "b", "c"], {"weights": [0.5, 0.0, 0.25]}) == (["a", "c"], {"weights": [0.5, 0.25]})
    assert simplify_sum(["a"], {"weights": [2.0]}) == (["a"], {"weights": [2.0]})
    assert simplify_sum(["a", "b"], {"weights": [0.0, 0.0]}) == (["a"], {"weights": [0.0]})


def test_the_identities_of_add_difference() -> None:
    assert simplify_difference(["a", "b", "b"], {"weight": 0.3}) == "a"
    assert simplify_difference(["a", "b", "c"], {"weight": 0.0}) == "a"
    assert simplify_difference(["a", "b", "a"], {"weight": 1.0}) == "b"
    assert simplify_difference(["a", "b", "a"], {"weight": 0.5}) == (["a", "b", "a"], {"weight": 0.5})


def test_the_identities_of_slerp() -> None:
    rest = {"parallel": 0.9995}
    assert simplify_slerp(["a", "b"], {"weight": 0.0, **rest}) == "a"
    assert simplify_slerp(["a", "b"], {"weight": 1.0, **rest}) == "b"
    assert simplify_slerp(["a", "a"], {"weight": 0.4, **rest}) == "a"
    assert simplify_slerp(["a", "b"], {"weight": 0.4, **rest}) == (["a", "b"], {"weight": 0.4, **rest})


@PROPERTY
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=12), st.floats(0, 1))
def test_slerp_may_be_walked_from_either_end(pairs: list[tuple[float, float]], weight: float) -> None:
    a, b = vector(*(p[0] for p in pairs)), vector(*(p[1] for p in pairs))
    there, back = slerp(a, b, weight=weight), slerp(b, a, weight=1 - weight)
    assert torch.allclose(there, back, rtol=1e-9, atol=1e-9 * float(a.abs().max() + b.abs().max() + 1e-30))


@PROPERTY
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=12), st.integers(-8, 8))
def test_slerp_scales_exactly_with_powers_of_two(pairs: list[tuple[float, float]], power: int) -> None:
    a, b = vector(*(p[0] for p in pairs)), vector(*(p[1] for p in pairs))
    scale = 2.0**power
    assert torch.equal(slerp(a * scale, b * scale, weight=0.3), slerp(a, b, weight=0.3) * scale)


@PROPERTY
@given(NUMBERS, NUMBERS, st.floats(0, 1))
def test_the_line_never_leaves_its_ends(a: float, b: float, share: float) -> None:
    result = float(weighted_sum(vector(a), vector(b), weights=[complement(share), share]))
    slack = 1e-12 * (abs(a) + abs(b))
    assert min(a, b) - slack <= result <= max(a, b) + slack


@PROPERTY
@given(NUMBERS, NUMBERS, NUMBERS, st.floats(-2, 2))
def test_fp32_arithmetic_is_within_one_unit_of_exact_after_rounding_to_fp16(
    a: float, b: float, c: float, weight: float
) -> None:
    """Design §5: ≤ 16-bit inputs in fp32, within one unit in the last place (of the largest term) of exact."""
    x, y, z = (torch.tensor([v]).clamp(-100, 100).half().float() for v in (a, b, c))
    exact = add_difference(x.double(), y.double(), z.double(), weight=weight)
    found = rounded("x", add_difference(x, y, z, weight=weight), torch.float16)
    scale = max(float(v.abs()) for v in (x, y * weight, z * weight, exact, torch.tensor([2**-14])))
    assert abs(float(found) - float(exact)) <= 2.0 ** (math.floor(math.log2(scale)) - 10)
