"""Arithmetic that may not depend on the machine: reductions, matrix products and scalar functions."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdforge.exact import (
    CONTEXT,
    arc_weights,
    arccos,
    arctan,
    column_dots,
    complement,
    dot,
    half_turn,
    product,
    root,
    sine,
)

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
PI = "3.1415926535897932384626433832795028841971693993751"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_half_a_turn_is_pi() -> None:
    assert abs(half_turn() - Decimal(PI)) < Decimal("1e-47")


@PROPERTY
@given(st.floats(-0.9999, 0.9999))
def test_scalar_functions_agree_with_the_library(x: float) -> None:
    with localcontext(CONTEXT):
        assert float(arccos(Decimal(x))) == pytest.approx(math.acos(x), rel=1e-14, abs=1e-15)
        assert float(sine(Decimal(4 * x))) == pytest.approx(math.sin(4 * x), rel=1e-13, abs=1e-15)
        assert float(arctan(Decimal(abs(x)))) == pytest.approx(math.atan(abs(x)), rel=1e-14, abs=1e-15)


@PROPERTY
@given(st.floats(-0.999, 0.999), st.floats(0, 1))
def test_arc_weights_agree_with_the_library(cosine: float, share: float) -> None:
    angle = math.acos(cosine)
    expected = math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)
    assert arc_weights(Decimal(cosine), share) == pytest.approx(expected, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize(("weight", "rest"), [(0.1, 0.9), (0.9, 0.1), (0.7, 0.3), (1.0, 0.0), (1e-20, 1.0)])
def test_the_complement_is_that_of_the_decimal(weight: float, rest: float) -> None:
    assert complement(weight) == rest


@pytest.mark.parametrize("count", [0, 1, 7, 65_535, 65_536, 65_537, 200_000])
def test_a_dot_product_is_nearly_exact(count: int) -> None:
    a, b = random(count, seed=1), random(count, seed=2)
    exact = math.fsum((a * b).tolist())
    size = float((a * b).abs().sum())
    assert abs(float(dot(a, b)) - exact) <= 17 * 2**-53 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_roots_are_rounded_correctly(dtype: torch.dtype) -> None:
    """A root is right if the squares of the points halfway to its neighbours enclose the number."""
    x = random(1000, seed=3).abs().to(dtype)
    found = root(x)
    assert (found.shape, found.dtype) == (x.shape, dtype)
    up, down = found.nextafter(found + 1), found.nextafter(found - 1)
    for number, low, middle, high in zip(*(t.tolist() for t in (x, down, found, up)), strict=True):
        assert (
            ((Fraction(low) + Fraction(middle)) / 2) ** 2
            <= Fraction(number)
            <= ((Fraction(middle) + Fraction(high)) / 2) ** 2
        )
    strided = x.reshape(20, 50).T
    assert torch.equal(root(strided), found.reshape(20, 50).T)
    assert root(x[0]).shape == ()


@PROPERTY
@given(st.integers(1, 700), st.integers(0, 3))
def test_dot_products_of_columns_are_nearly_exact(rows: int, columns: int) -> None:
    a, b = random(rows, columns, seed=1), random(rows, columns, seed=2)
    found = column_dots(a.float(), b.float())
    assert (found.shape, found.dtype) == ((columns,), torch.float64)
    assert torch.allclose(found, (a.float().double() * b.float().double()).sum(0), rtol=0, atol=1e-12 * rows)


def test_a_dot_product_does_not_depend_on_where_zeros_are_appended() -> None:
    a, b = random(70_000, seed=1), random(70_000, seed=2)
    longer = [torch.cat([x, x.new_zeros(5_000)]) for x in (a, b)]
    assert dot(*longer) == dot(a, b)


def test_large_blocks_cancel_without_error() -> None:
    a = torch.zeros(3 * 65_536, dtype=torch.float64)
    a[0], a[65_536], a[2 * 65_536] = 1e16, 1.0, -1e16
    assert dot(a, torch.ones_like(a)) == 1


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize(("rows", "rank", "columns"), [(1, 1, 1), (5, 3, 7), (300, 4, 9), (6, 300, 5)])
def test_a_product_of_factors_is_nearly_exact(rows: int, rank: int, columns: int, sliced: bool) -> None:
    up, down = random(rows, rank, seed=1).float(), random(rank, columns, seed=2).float()
    found = product(up, down, sliced=sliced)
    size = up.double().abs() @ down.double().abs()
    assert bool(((found - up.double() @ down.double()).abs() <= 2**-40 * size).all())


def test_a_sliced_product_does_not_depend_on_the_order_of_ranks() -> None:
    up, down = random(33, 64, seed=1).float(), random(64, 17, seed=2).float()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(product(up[:, order], down[order], sliced=True), product(up, down, sliced=True))


def test_a_sliced_product_of_fp16_factors_is_exact() -> None:
    up, down = random(3, 5, seed=1).half(), random(5, 4, seed=2).half()
    found = product(up, down, sliced=True)
    for i in range(3):
        for j in range(4):
            exact = sum(Fraction(float(up[i, k])) * Fraction(float(down[k, j])) for k in range(5))
            assert float(found[i, j]) == float(exact)


@pytest.mark.parametrize("sliced", [False, True])
def test_a_product_with_zeros_is_zero(sliced: bool) -> None:
    up, down = torch.zeros(4, 2), random(2, 3).float()
    assert torch.equal(product(up, down, sliced=sliced), torch.zeros(4, 3, dtype=torch.float64))
