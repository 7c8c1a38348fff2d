"""Numbers that a reader can check by hand: facts T1 … T39 of the reference on merge methods."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdforge.errors import UsageError
from sdforge.exact import complement, line
from sdforge.merges.add import add
from sdforge.merges.add import simplify as simplify_add
from sdforge.merges.add_difference import add_difference
from sdforge.merges.add_difference import simplify as simplify_difference
from sdforge.merges.add_perpendicular import add_perpendicular
from sdforge.merges.add_perpendicular import simplify as simplify_perpendicular
from sdforge.merges.adjust import COLORS, FACTORS, adjust
from sdforge.merges.adjust import simplify as simplify_adjust
from sdforge.merges.clamp import clamp
from sdforge.merges.clamp import simplify as simplify_clamp
from sdforge.merges.cosine import cosine
from sdforge.merges.cosine import simplify as simplify_cosine
from sdforge.merges.euclidean_add_difference import euclidean_add_difference
from sdforge.merges.extract_similar import extract_similar
from sdforge.merges.geometric_median import geometric_median
from sdforge.merges.karcher import karcher
from sdforge.merges.linear import linear
from sdforge.merges.linear import simplify as simplify_linear
from sdforge.merges.nearswap import nearswap
from sdforge.merges.scale import scale
from sdforge.merges.scale import simplify as simplify_scale
from sdforge.merges.similarity_add_difference import similarity_add_difference
from sdforge.merges.similarity_add_difference import simplify as simplify_similarity
from sdforge.merges.slerp import simplify as simplify_slerp
from sdforge.merges.slerp import slerp
from sdforge.merges.subtract import simplify as simplify_subtract
from sdforge.merges.subtract import subtract
from sdforge.merges.sum_twice import simplify as simplify_twice
from sdforge.merges.sum_twice import sum_twice
from sdforge.merges.tensor_sum import simplify as simplify_tensor
from sdforge.merges.tensor_sum import tensor_sum
from sdforge.merges.train_difference import simplify as simplify_train
from sdforge.merges.train_difference import train_difference
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


@pytest.mark.parametrize("weight", [0.49, 0.5, 0.55, -0.49, -0.55])
def test_a_line_is_computed_from_its_nearer_end(weight: float) -> None:
    a, b = torch.randn(2, 5000, generator=torch.Generator().manual_seed(3))
    rest = complement(weight)
    from_a, from_b = a + (b - a) * weight, b - (b - a) * rest
    assert not torch.equal(from_a, from_b)
    assert torch.equal(weighted_sum(a, b, weights=[rest, weight]), from_a if abs(weight) < 0.5 else from_b)


def test_negative_weights_are_weights() -> None:
    inputs, weights = ["a", "b"], [1.5, -0.5]
    assert simplify_sum(inputs, {"weights": weights}) == (inputs, {"weights": weights})


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


def test_t6_two_sums_in_one_step() -> None:
    assert sum_twice(A, B, C, alpha=0.25, beta=0.5).tolist() == [0.75, 1, -1.5, 0.5]


def test_t11_what_is_perpendicular() -> None:
    a, b, zero = vector(1, 1, 0), vector(1, 0, 2), vector(0, 0, 0)
    added = add_perpendicular(a, b, zero) - a
    assert added.tolist() == [0.5, -0.5, 2]
    assert float((added * a).sum()) == 0


def test_perpendicular_to_nothing_is_everything() -> None:
    assert add_perpendicular(C, B, C, weight=0.5).tolist() == [1.5, -0.5, 0, 0.5]


def test_what_is_parallel_adds_nothing() -> None:
    assert torch.allclose(add_perpendicular(C + (B - C) * 0.3, B, C), C + (B - C) * 0.3, rtol=1e-14)


def test_t12_what_is_learned_already_is_not_learned_again() -> None:
    assert near(train_difference(A, B, C), 3.16, -1.0857142857142854, -0.6, 0.5)
    assert near(train_difference(C, B, C), 2.7, -1.7, 0.8, 0.5)  # C + 1.8 / 2 (B − C)
    assert torch.equal(train_difference(B, B, C), B)


def test_t13_likeness_turns_a_difference_into_a_mean() -> None:
    assert near(similarity_add_difference(A, B, C), 1.8333333333333335, 0.5, -2, 0.5)
    assert torch.equal(similarity_add_difference(A, B, C, beta=0.0), add_difference(A, B, C, weight=0.5))
    zero, one = vector(0), vector(1)
    assert similarity_add_difference(zero, zero, one).tolist() == [0]  # two zeros are alike
    assert torch.equal(similarity_add_difference(A, A, A, alpha=0.3), A)


def test_t13_holds_for_weights_whose_square_is_no_number_of_fp16_or_bf16() -> None:
    tiny = torch.tensor([1e-30])
    assert torch.allclose(
        similarity_add_difference(tiny, tiny * 2, tiny * 0) / 1e-30, torch.tensor([1.4375]), rtol=1e-5
    )


def test_t16_where_columns_point_the_same_way_the_first_stays() -> None:
    assert near(cosine(vector(1, 0), vector(1, 1)), 1, 0.7928932188134525)
    assert torch.equal(cosine(A, B, weight=1.0), B)
    assert torch.equal(cosine(A, 2 * A, weight=0.0), A)


def test_the_cosine_of_columns_is_taken_over_rows() -> None:
    a, b = torch.eye(2).double(), torch.tensor([[3.0, 1.0], [0.0, 0.0]]).double()
    assert cosine(a, b, weight=0.0).tolist() == [[1, 1], [0, 0]]  # the first column alike, the second not at all
    mean = cosine(a, b, weight=0.0, similarity="mean")
    whole = 3 / (math.sqrt(2) * math.sqrt(10))
    assert mean.flatten().tolist() == pytest.approx([3 - (1 + whole), 1 - whole / 2, 0, whole / 2])


@pytest.mark.parametrize(("offset", "rows"), [(0.25, {2, 3, 4, 5}), (0.625, {0, 5, 6, 7}), (0.75, {0, 1, 6, 7})])
def test_t18_a_region_of_rows_comes_from_the_second(offset: float, rows: set[int]) -> None:
    found = tensor_sum(torch.zeros(8, 3), torch.ones(8, 3), width=0.5, offset=offset)
    assert {i for i, row in enumerate(found.tolist()) if row == [1, 1, 1]} == rows
    assert set(found.flatten().tolist()) <= {0, 1}


@pytest.mark.parametrize(("width", "expected"), [(0.5, 0), (0.51, 1)])
def test_a_single_number_is_that_of_the_second_from_more_than_half_on(width: float, expected: int) -> None:
    assert tensor_sum(torch.tensor(0), torch.tensor(1), width=width).item() == expected


@PROPERTY
@given(st.integers(1, 40), st.floats(0, 1), st.floats(0, 1))
def test_every_row_is_one_of_the_two_and_their_number_is_the_width(count: int, width: float, offset: float) -> None:
    found = tensor_sum(torch.zeros(count), torch.ones(count), width=width, offset=offset)
    assert abs(float(found.sum()) - width * count) <= 2


def test_t19_rows_are_counted_on_the_decimal_as_written() -> None:
    assert float(tensor_sum(torch.zeros(100), torch.ones(100), width=0.29).sum()) == 29


def test_t29_no_number_leaves_the_limits() -> None:
    assert clamp(vector(5, -1, 0.5), vector(0, 0, 0), vector(1, 1, 1)).tolist() == [1, 0, 0.5]
    assert torch.equal(clamp(A, A), A)
    once = clamp(A, B, C)
    assert torch.equal(clamp(once, B, C), once)


def test_stiff_limits_are_those_nearest_the_mean() -> None:
    limits = vector(0), vector(4), vector(10)  # of mean 14/3
    assert clamp(vector(0.0), *limits, stiffness=1.0).tolist() == [4]
    assert clamp(vector(20.0), *limits, stiffness=1.0).tolist() == [10]
    assert clamp(vector(0.0), *limits, stiffness=0.25).tolist() == [1]
    limits = vector(0), vector(4), vector(8), vector(10)  # of mean 5.5
    assert clamp(vector(20.0), *limits, stiffness=1.0).tolist() == [8]
    limits = vector(0), vector(5), vector(10)  # one of them is the mean: it is nearest on both sides
    assert clamp(vector(0.0, 20.0), *(each.expand(2) for each in limits), stiffness=1.0).tolist() == [5, 5]


def test_clamping_a_rounded_merge_gives_what_clamping_before_rounding_would() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(5000, generator=draw).half() for _ in range(3))
    merge = add_difference(a.float(), b.float(), c.float(), weight=1.5)
    inside = clamp(merge, a.float(), b.float()).half()
    assert torch.equal(clamp(merge.half().float(), a.float(), b.float()).half(), inside)


def test_t15_two_sides_of_a_right_angle() -> None:
    found = euclidean_add_difference(vector(3, 0), vector(0, 4), vector(0, 0))
    assert near(found, 1.7677669529663689, 1.7677669529663689)  # 2.5 / √2
    assert torch.allclose(euclidean_add_difference(A, B, C, weight=0.0), A, rtol=1e-14)
    assert torch.allclose(euclidean_add_difference(A, A, C), A, rtol=1e-14)
    assert torch.equal(euclidean_add_difference(A, A, A), A)


def test_t17_what_two_have_learned_alike() -> None:
    base, b, c = vector(0, 0), vector(1, 0), vector(0, 2)
    assert extract_similar(base, b, c).tolist() == [0.25, 0.5]
    assert extract_similar(base, b, c, beta=1.0, gamma=2).tolist() == [0.375, 0.75]
    rows = extract_similar(torch.zeros(2, 2), torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, -1.0]]), alpha=0.0)
    assert rows.tolist() == [[1, 0], [0, 0]]  # the first row alike, the second opposite


def test_t25_the_geometric_median_of_a_triangle_and_of_a_square() -> None:
    triangle = geometric_median(vector(0, 0), vector(1, 0), vector(0, 1))
    assert triangle.tolist() == pytest.approx([0.21132486540518713] * 2, abs=1e-12)
    assert geometric_median(vector(0, 0), vector(2, 0), vector(0, 2), vector(2, 2)).tolist() == [1, 1]


def test_an_outlier_weighs_less_than_in_a_mean() -> None:
    found = geometric_median(vector(0, 0), vector(0, 0), vector(9, 0))
    assert abs(float(found[0])) < 1e-4


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_the_geometric_median_of_small_and_large_points_is_as_of_others(scale: float) -> None:
    for points in ([(0, 0), (1, 0), (0, 1)], [(0, 0), (0, 0), (9, 0)]):
        vectors = [vector(*point) for point in points]
        assert geometric_median(*(scale * each for each in vectors)).tolist() == pytest.approx(
            (scale * geometric_median(*vectors)).tolist(), rel=1e-9
        )


def test_t26_the_mean_of_directions_times_the_mean_of_lengths() -> None:
    assert near(karcher(vector(1, 0), vector(0, 2)), 1.0606601717798212, 1.0606601717798212)  # 1.5 / √2
    three = karcher(vector(1, 0, 0), vector(0, 1, 0), vector(0, 0, 1))
    assert three.tolist() == pytest.approx([math.sqrt(1 / 3)] * 3, rel=1e-12)


@PROPERTY
@given(st.floats(0.1, 1.4), st.floats(0.1, 1.4))
def test_on_a_circle_the_mean_of_directions_is_that_of_angles(first: float, second: float) -> None:
    """Three angles, one of them 0, all within half a turn."""
    found = karcher(*(vector(math.cos(angle), math.sin(angle)) for angle in (0.0, first, -second)), max_iter=50)
    mean = (first - second) / 3
    assert found.tolist() == pytest.approx([math.cos(mean), math.sin(mean)], abs=1e-5)


def test_directions_that_cancel_have_their_plain_mean() -> None:
    assert karcher(vector(1, 0), vector(-1, 0)).tolist() == [0, 0]
    assert karcher(vector(0, 0), vector(0, 0)).tolist() == [0, 0]
    assert karcher(vector(0, 0), vector(0, 4)).tolist() == [0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 100, 5000])
def test_opposite_directions_have_none_in_common_however_many_numbers_they_have(count: int, dtype: torch.dtype) -> None:
    """Cosines miss −1 by 1e-16, as sums and since −3 m is rounded: the sine of their angle is 1e-8 and not 0."""
    for seed in range(5):
        m = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        assert torch.allclose(karcher(m, -3 * m), -m, rtol=1e-5, atol=1e-6)
        assert torch.allclose(karcher(m, 2 * m, -3 * m), 2 * m, rtol=1e-5, atol=1e-6)


def test_numbers_have_signs_for_directions() -> None:
    assert karcher(vector(0.1), vector(-0.3)).item() == pytest.approx(-0.1)
    assert karcher(vector(0.1), vector(0.2), vector(-0.3)).item() == pytest.approx(0.2)
    four = [0.82161814, -1.30315723, 0.00905356, -5.36953235]
    assert karcher(*map(vector, four)).item() == pytest.approx(sum(four) / 4)


def test_t27_a_step_no_longer_than_t() -> None:
    assert near(nearswap(vector(1, 1, 1), vector(1.001, 1.1, 2), t=0.01), 1.001, 1.01, 1.01)
    assert near(nearswap(vector(0, 0, 0), vector(1e-9, -2e-8, 1), t=1e-8), 1e-9, -1e-8, 1e-8)
    assert torch.equal(nearswap(A.float(), A.float() + 1, t=1e-60), A.float())  # which is 0 in fp32
    assert torch.equal(nearswap(A.float(), A.float(), t=1e-60), A.float())
    assert torch.equal(nearswap(A, A, t=0.5), A)


def test_t30_six_tensors_are_adjusted() -> None:
    names = ["conv_in.weight", "conv_in.bias", "conv_norm_out.weight", "conv_norm_out.bias", "conv_out.weight"]
    numbers: dict[str, Any] = {
        "detail_in": 5.0,
        "detail_out": 5.0,
        "detail_out2": 5.0,
        "contrast": 2.0,
        "brightness": 1.0,
    }
    one = vector(1)
    assert [float(adjust(one, **numbers, tensor=f"unet.{name}")) for name in names] == [0.95, 1.1, 0.95, 1.1, 0.95]
    zeros = vector(0, 0, 0, 0)
    assert near(adjust(zeros, **numbers, tensor="unet.conv_out.bias"), 0.04, -0.02, 0.02 / 3, 0.04 / 3)
    assert adjust(zeros, **numbers, latents="sdxl", tensor="unet.conv_out.bias").tolist() == [0.04, 0, 0, 0.02]
    assert adjust(one, **numbers, tensor="unet.mid.bias").tolist() == [1]


@pytest.mark.parametrize(
    ("color", "sd", "sdxl"),
    [("cyan_red", [0, 1, 1, 0], [0, 1, 0, 0]), ("magenta_green", [0, 0, -1, -1], [0, -1, -1, 0]),
     ("yellow_blue", [0, 1, 0, 1], [0, -1, 1, 0])],
)  # fmt: skip
def test_colors_are_directions_of_the_latents(color: str, sd: list[float], sdxl: list[float]) -> None:
    given: dict[str, Any] = {color: 50.0, "tensor": "unet.conv_out.bias"}
    assert adjust(vector(0, 0, 0, 0), **given).tolist() == sd
    assert adjust(vector(0, 0, 0, 0), **given, latents="sdxl").tolist() == sdxl


def test_each_tensor_is_adjusted_by_its_own_settings_alone() -> None:
    rest: dict[str, Any] = dict.fromkeys((name for name, _ in FACTORS.values()), 0.0) | dict.fromkeys(COLORS, 0.0)
    rest |= {"contrast": 0.0, "latents": "sd", "detail_in": 3.0}
    assert simplify_adjust(["a"], rest | {"tensor": "unet.conv_out.bias"}) == "a"
    assert simplify_adjust(["a"], rest | {"tensor": "unet.mid_block.bias"}) == "a"
    kept = simplify_adjust(["a"], rest | {"tensor": "unet.conv_in.bias", "latents": "sdxl"})
    assert kept == (["a"], {"detail_in": 3.0, "tensor": "unet.conv_in.bias"})


def test_a_delta_added_to_where_it_was_taken_from_gives_what_it_was_taken_of() -> None:
    assert add(C, subtract(B, C)).tolist() == B.tolist()
    assert add(A, subtract(B, C), weight=0.5).tolist() == add_difference(A, B, C, weight=0.5).tolist()
    assert simplify_add(["a", "d"], {"weight": 0.0}) == "a"
    assert simplify_subtract(["a", "a"], {"weight": 1.0}) == (["a", "a"], {"weight": 1.0})


def test_linear_is_a_mean() -> None:
    assert linear(A, B, C, weights=[1, 1, 2]).tolist() == [1, 0.5, -1, 0.5]
    assert linear(A, B, weights=[3, 1]).tolist() == [1.5, 1, -2, 0.5]
    assert torch.allclose(linear(A, B, C), (A + B + C) / 3, rtol=1e-15)


def test_the_identities_of_linear() -> None:
    assert simplify_linear(["a"], {"weights": []}) == "a"
    assert simplify_linear(["a", "b"], {"weights": [0.0, 3.0]}) == "b"
    assert simplify_linear(["a", "a", "a"], {"weights": [0.3, 1.0, 5.0]}) == "a"
    two = ["a", "b"], {"weights": [1.0, 2.0]}
    assert simplify_linear(["b", "a"], {"weights": [0.2, 0.1]}) == two
    assert simplify_linear(["a", "x", "b"], {"weights": [5.0, 0.0, 10.0]}) == two
    with pytest.raises(UsageError, match="sum to 0"):
        simplify_linear(["a", "b"], {"weights": [0.3, -0.3]})


def test_scale_is_a_product() -> None:
    assert scale(A, weight=0.5).tolist() == [0.5, 1, -1.5, 0.25]
    assert simplify_scale(["a"], {"weight": 1.0}) == "a"
    assert simplify_scale(["a"], {"weight": 0.0}) == (["a"], {"weight": 0.0})


def test_the_identities_of_sum_twice() -> None:
    def left(a: str, b: str, c: str, alpha: float, beta: float) -> object:
        return simplify_twice([a, b, c], {"alpha": alpha, "beta": beta})

    assert left("a", "b", "c", 0.3, 1.0) == "c"
    assert left("a", "b", "c", 0.0, 0.0) == "a"
    assert left("a", "b", "c", 1.0, 0.0) == "b"
    assert left("a", "b", "b", 1.0, 0.4) == "b"
    assert left("a", "b", "c", 0.3, 0.0) == (["a", "b", "a"], {"alpha": 0.3, "beta": 0.0})
    assert left("a", "b", "c", 1.0, 0.4) == left("b", "a", "c", 0.0, 0.4) == left("b", "b", "c", 0.7, 0.4)


def test_the_identities_of_differences() -> None:
    train, like = {"weight": 0.5, "gain": 1.8}, {"alpha": 0.5, "beta": 1.0}
    assert simplify_train(["a", "b", "b"], train) == simplify_train(["a", "a", "c"], train) == "a"
    assert simplify_train(["a", "b", "c"], train | {"weight": 0.0}) == "a"
    assert simplify_train(["a", "b", "a"], train) == (["a", "b", "a"], train)
    assert simplify_similarity(["a", "b", "c"], like | {"alpha": 0.0}) == "a"
    assert simplify_similarity(["a", "a", "c"], like) == (["a", "a", "c"], like)
    assert simplify_perpendicular(["a", "b", "b"], {"weight": 0.5}) == "a"
    assert simplify_perpendicular(["a", "a", "c"], {"weight": 0.5}) == "a"
    assert simplify_perpendicular(["a", "b", "a"], {"weight": 1.0}) == "b"


def test_the_identities_of_choices() -> None:
    assert simplify_tensor(["a", "b"], {"width": 0.0, "offset": 0.3}) == "a"
    assert simplify_tensor(["a", "b"], {"width": 1.0, "offset": 0.3}) == "b"
    assert simplify_cosine(["a", "b"], {"weight": 1.0, "similarity": "columns"}) == "b"
    assert simplify_clamp(["a", "b", "b"], {"stiffness": 0.5}) == "b"
    assert simplify_clamp(["a", "b", "a"], {"stiffness": 0.0}) == "a"
    assert simplify_clamp(["a", "c", "b", "c"], {"stiffness": 0.0}) == (["a", "b", "c"], {"stiffness": 0.0})


@PROPERTY
@given(NUMBERS, NUMBERS, st.floats(0, 1))
def test_a_line_whose_weights_are_a_tensor_is_exact_at_its_ends(a: float, b: float, weight: float) -> None:
    x, y, w = vector(a, a, a), vector(b, b, b), vector(0, 1, weight)
    assert line(x, y, w)[:2].tolist() == [a, b]
    assert float(line(x, x, w)[2]) == a


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
