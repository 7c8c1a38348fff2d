"""Merges of differences from a base: what is trimmed, drawn, voted for and added. Facts T19 … T24, T33, T34."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdforge.errors import UsageError
from sdforge.exact import drawn, philox, random_words, share_of
from sdforge.merges._task_vectors import SMALLEST_SUM, _sums, coefficients, kept
from sdforge.merges.add_difference import add_difference
from sdforge.merges.add_perpendicular import add_perpendicular
from sdforge.merges.breadcrumbs import breadcrumbs
from sdforge.merges.breadcrumbs import simplify as simplify_breadcrumbs
from sdforge.merges.dare import dare
from sdforge.merges.dare import simplify as simplify_dare
from sdforge.merges.della import _chances, della
from sdforge.merges.della import simplify as simplify_della
from sdforge.merges.euclidean_add_difference import euclidean_add_difference
from sdforge.merges.extract_similar import extract_similar
from sdforge.merges.model_stock import model_stock
from sdforge.merges.model_stock import simplify as simplify_stock
from sdforge.merges.sce import sce
from sdforge.merges.task_arithmetic import simplify as simplify_arithmetic
from sdforge.merges.task_arithmetic import task_arithmetic
from sdforge.merges.ties import simplify as simplify_ties
from sdforge.merges.ties import ties
from sdforge.merges.train_difference import train_difference

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
NUMBERS = st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=12)
ARITHMETIC = {"weights": [], "scale": 1.0, "normalize": False}
TIES = {"weights": [], "density": 0.6, "vote": "sum", "scale": 1.0, "normalize": True}
DARE = {"weights": [], "density": 0.3, "rescale": True, "vote": "none", "scale": 1.0, "normalize": False}
SEEDED: dict[str, Any] = {**DARE, "seed": 3, "tensor": "unet.conv_in.weight"}


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


BASE = vector(0, 0, 0, 0, 0)
D1, D2, D3 = vector(4, -1, 0.5, -3, 0), vector(-2, -2, 1, 3, 0.1), vector(1, 5, -0.25, 0, -0.1)


def trimmed(d: Tensor, density: float, *, outliers: float = 0.0) -> Tensor:
    """What is left of a difference from nothing."""
    return d * kept(torch.zeros_like(d), d, density, outliers=outliers)


def near(found: Tensor, *numbers: float) -> bool:
    expected = vector(*numbers)
    return bool(((found - expected).abs() <= 2 * np.finfo(np.float64).eps * expected.abs()).all())


# -- what is left of a vector ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "count"), [(0.29, 29), (0.57, 57), (0.001, 1), (0.0, 0), (1.0, 100)])
def test_t19_a_share_is_counted_on_the_decimal_as_written(share: float, count: int) -> None:
    assert share_of(100, share) == count
    assert int(0.29 * 100) == 28


def test_t21_two_tenths_of_ten_are_two() -> None:
    assert int(trimmed(torch.arange(1.0, 11), 0.2).count_nonzero()) == 2


def test_t22_of_equal_numbers_the_first_are_kept() -> None:
    assert trimmed(vector(1, -1, 1, -1, 2), 0.6).tolist() == [1, -1, 0, 0, 2]


@PROPERTY
@given(NUMBERS, st.sampled_from([0.2, 0.5, 0.8]))
def test_what_has_been_trimmed_stays(numbers: list[float], density: float) -> None:
    once = trimmed(vector(*numbers), density)
    assert torch.equal(trimmed(once, density), once)


def test_t23_breadcrumbs_leave_the_middle() -> None:
    d = vector(1, -2, 3, -4, 5, -6, 7, -8, 9, -10)
    left = trimmed(d, 0.5, outliers=0.2)
    assert left[left != 0].tolist() == [-4, 5, -6, 7, -8]
    assert int(trimmed(vector(1, 2, 3, 4), 0.9, outliers=0.01).count_nonzero()) == 3


def test_outliers_go_only_as_long_as_enough_is_left() -> None:
    assert trimmed(vector(1, 2, 3, 4), 1.0, outliers=0.5).tolist() == [1, 2, 3, 4]
    assert trimmed(vector(1, 2, 3, 4), 0.75, outliers=0.5).tolist() == [1, 2, 3, 0]


def test_breadcrumbs_without_outliers_trim_as_ties_do() -> None:
    found = breadcrumbs(BASE, D1, density=0.6, gamma=0.0)
    assert torch.equal(found, ties(BASE, D1, density=0.6, normalize=False))


HALF: dict[str, Any] = {"density": 0.5, "seed": 3, "tensor": "unet.x"}
OF_DIFFERENCES: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "add_difference": (lambda base, a, b, _: add_difference(a, b, base, weight=0.7), {}),
    "add_perpendicular": (lambda base, a, b, _: add_perpendicular(a, b, base), {}),
    "euclidean_add_difference": (lambda base, a, b, _: euclidean_add_difference(a, b, base, weight=0.3), {}),
    "train_difference": (lambda base, a, b, _: train_difference(a, b, base), {}),
    "extract_similar": (lambda base, a, b, _: extract_similar(base, a, b, alpha=0.3, beta=0.4), {}),
    "task_arithmetic": (task_arithmetic, {"weights": [0.5, 1.5, -1.0], "scale": 0.9}),
    "ties": (ties, {"weights": [0.5, 1.5, 1.0], "density": 0.6, "scale": 0.9}),
    "ties by count": (ties, {"density": 0.6, "vote": "count", "normalize": False}),
    "breadcrumbs": (breadcrumbs, {"density": 0.6, "gamma": 0.2}),
    "breadcrumbs with a vote": (breadcrumbs, {"density": 0.6, "gamma": 0.2, "vote": "sum", "scale": 0.9}),
    "dare": (dare, HALF),
    "dare with a vote": (dare, HALF | {"vote": "sum", "scale": 0.9}),
    "della": (della, HALF | {"epsilon": 0.2, "scale": 0.9}),
    "della without": (della, HALF | {"epsilon": 0.2, "vote": "none"}),
    "sce": (sce, {"select_topk": 0.6}),
    "model_stock": (lambda base, a, b, _: model_stock(base, a, a + (b - base)), {}),
}


@pytest.mark.parametrize("name", OF_DIFFERENCES)
def test_what_is_made_of_differences_moves_with_the_base(name: str) -> None:
    """d = M − base alone decides: with all inputs shifted by the same numbers the result is shifted by those."""
    merge, settings_of = OF_DIFFERENCES[name]
    shift = vector(8, -16, 32, 0.5, -4)
    still = merge(BASE, D1, D2, D3, **settings_of)
    moved = merge(BASE + shift, D1 + shift, D2 + shift, D3 + shift, **settings_of)
    assert not torch.equal(still, BASE)
    assert torch.allclose(moved, still + shift, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("merge", "rest"),
    [
        (breadcrumbs, {"density": 0.6, "gamma": 0.0, "normalize": True}),
        (dare, {"density": 1.0, "normalize": True}),
        (della, {"density": 1.0, "epsilon": 0.0}),
    ],
)
@pytest.mark.parametrize("vote", ["sum", "count"])
def test_a_vote_is_that_of_ties_where_the_same_is_left(merge: Callable[..., Tensor], rest: Any, vote: str) -> None:
    """And without a vote all is added: w₁ d₁ + w₂ d₂ + w₃ d₃."""
    three, weights = (BASE, D1, D2, D3), [0.5, 1.5, 1.0]
    kept_share = rest["density"]
    expected = ties(*three, weights=weights, density=kept_share, vote=vote, scale=0.5)
    assert torch.allclose(merge(*three, **rest, weights=weights, vote=vote, scale=0.5), expected, rtol=1e-14)
    added = sum(w * trimmed(d, kept_share) for w, d in zip(weights, (D1, D2, D3), strict=True))
    found = merge(*three, **(rest | {"normalize": False}), weights=weights, vote="none", scale=0.5)
    assert torch.allclose(found, 0.5 * added, rtol=1e-14, atol=1e-14)


# -- the vote ----------------------------------------------------------------------------------------------------------


def test_t20_ties() -> None:
    three = (BASE, D1, D2, D3)
    assert ties(*three, density=0.6).tolist() == [2.5, 5, -0.25, 3, 0]
    assert ties(*three, density=0.6, normalize=False).tolist() == [5, 5, -0.25, 3, 0]
    assert ties(*three, density=0.6, vote="count").tolist() == [2.5, -1.5, -0.25, 3, 0]
    assert near(ties(*three, density=0.6, weights=[1, 2, 0.5]), 3, -5 / 3, -0.25, 3, 0)
    assert ties(*three, density=0.6, weights=[1, 2, 0.5], normalize=False).tolist() == [4.5, -5, -0.125, 6, 0]


def test_one_checkpoint_that_is_left_whole_agrees_with_itself() -> None:
    base, model = vector(1, 2, 3), vector(2, 0, 3)
    assert torch.equal(ties(base, model, density=1.0), model)
    assert ties(base, model, density=1.0, scale=0.5).tolist() == [1.5, 1, 3]


@PROPERTY
@given(st.lists(st.tuples(*[st.floats(0.1, 9)] * 3), min_size=1, max_size=5))
def test_those_that_all_agree_are_averaged(rows: list[tuple[float, float, float]]) -> None:
    models = [vector(*column) for column in zip(*rows, strict=True)]
    mean = (models[0] + 2 * models[1] + models[2]) / 4
    assert torch.allclose(ties(torch.zeros_like(mean), *models, weights=[1, 2, 1], density=1.0), mean, rtol=1e-14)


def test_opposite_differences_give_the_opposite_but_where_the_vote_is_even() -> None:
    there = ties(BASE, D1, D2, D3, density=0.6)
    back = ties(BASE, -D1, -D2, -D3, density=0.6)
    assert (there + back)[[0, 1, 2, 4]].tolist() == [0, 0, 0, 0]
    assert (float(there[3]), float(back[3])) == (3, 3)  # −3 + 3 is even, and even is plus


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [[0.3, -0.1, -0.2], [0.1, 0.2, -0.3], [0.7, 0.1, -0.8], [1.1, 2.2, -3.3]])
@pytest.mark.parametrize(
    ("merge", "rest"),
    [(ties, {}), (breadcrumbs, {"gamma": 0.0, "vote": "sum"}), (dare, {"vote": "sum"}), (della, {"epsilon": 0.0})],
)
def test_weights_of_those_that_agree_which_add_up_to_nothing_divide_by_one(
    merge: Callable[..., Tensor], rest: dict[str, Any], weights: list[float], dtype: torch.dtype
) -> None:
    """The sums of their floats are up to 1e-8, and not 0."""
    models = [torch.tensor([1.0 if weight > 0 else -1.0], dtype=dtype) for weight in weights]
    found = merge(torch.zeros(1, dtype=dtype), *models, weights=weights, density=1.0, normalize=True, **rest)
    assert found.item() == pytest.approx(sum(map(abs, weights)), rel=1e-6)


@PROPERTY
@given(st.lists(st.integers(-3000, 3000).map(lambda n: n / 1000) | st.floats(-2, 2), min_size=1, max_size=6))
def test_weights_are_added_as_decimals_whichever_of_them_agree(weights: list[float]) -> None:
    which = torch.tensor(list(product([False, True], repeat=len(weights))))
    for row, found in zip(which.tolist(), _sums(weights, list(which.T)).tolist(), strict=True):
        exact = sum((Fraction(repr(w)) for w, yes in zip(weights, row, strict=True) if yes), Fraction(0))
        if abs(abs(exact) - SMALLEST_SUM) > SMALLEST_SUM / 10**6:  # a float such as 1e-300 is no whole number of units
            assert found == pytest.approx(float(exact) if abs(exact) > SMALLEST_SUM else 1.0, rel=1e-9)


def test_weights_of_any_size_have_a_sum() -> None:
    all_of_them = [torch.tensor([True])] * 2
    assert _sums([0.0, 0.0], all_of_them).item() == 1
    assert _sums([5e-324, -5e-324], all_of_them).item() == 1
    assert _sums([1e300, 1e300], all_of_them).item() == pytest.approx(2e300)
    assert _sums([1e17, 1e-17], all_of_them).item() == 1e17


def test_the_identities_of_ties() -> None:
    assert simplify_ties(["base", "base", "a"], TIES | {"weights": [1.0, 0.0]}) == "base"
    assert simplify_ties(["base", "a"], TIES | {"scale": 0.0}) == "base"
    assert simplify_ties(["base", "b", "a", "base"], TIES) == (["base", "a", "b"], TIES | {"weights": [1.0, 1.0]})


# -- the sum -----------------------------------------------------------------------------------------------------------


def test_task_arithmetic_adds_what_each_has_learned() -> None:
    base, a, b = vector(1, 1), vector(2, 1), vector(1, 5)
    assert task_arithmetic(base, a, b).tolist() == [2, 5]
    assert task_arithmetic(base, a, b, weights=[0.5, -0.25], scale=2.0).tolist() == [2, -1]
    assert task_arithmetic(base, a, b, weights=[1, 3], normalize=True).tolist() == [1.25, 4]


def test_weights_are_divided_by_their_sum_exactly_and_not_by_nothing() -> None:
    assert coefficients([0.1, 0.2], 1.0, normalize=True) == [1 / 3, 2 / 3]
    assert coefficients([0.3, -0.3], 2.0, normalize=True) == [0.6, -0.6]


def test_the_identities_of_task_arithmetic() -> None:
    assert simplify_arithmetic(["base", "a"], ARITHMETIC) == "a"
    assert simplify_arithmetic(["base", "a"], ARITHMETIC | {"weights": [0.5], "scale": 2.0}) == "a"
    assert simplify_arithmetic(["base", "a"], ARITHMETIC | {"weights": [0.0]}) == "base"
    assert simplify_arithmetic(["base", "a", "base"], ARITHMETIC) == "a"
    halves = ["base", "a", "b"], ARITHMETIC | {"weights": [0.25, 0.75]}
    assert simplify_arithmetic(["base", "b", "a"], ARITHMETIC | {"weights": [1.5, 0.5], "normalize": True}) == halves


# -- chance ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_t33_philox_gives_the_published_words(key: tuple[int, int], counter: tuple[int, ...], expected: str) -> None:
    found = philox(key, np.array(counter, dtype=np.uint64).reshape(4, 1))
    assert " ".join(f"{int(word):08x}" for word in found[:, 0]) == expected


def test_t33_the_key_is_the_beginning_of_the_names_hash() -> None:
    names = ("sdforge.dare", "0", "model.diffusion_model.out.2.bias", "1")
    assert hashlib.sha256("\0".join(names).encode()).hexdigest()[:16] == "6c00c3de0a196791"
    (found,) = random_words(4, *names)
    assert found.tolist() == philox((0x6C00C3DE, 0x0A196791), np.zeros((4, 1), np.uint64))[:, 0].tolist()


def test_a_longer_draw_begins_as_a_shorter_one() -> None:
    long = torch.cat(list(random_words(140_001, "x")))
    assert long.numel() == 140_001
    assert torch.equal(long[:70_003], torch.cat(list(random_words(70_003, "x"))))


def test_t34_what_is_kept_is_divided_by_the_density(monkeypatch: pytest.MonkeyPatch) -> None:
    u = torch.tensor([0.05, 0.5, 0.95, 0.31], dtype=torch.float64)
    monkeypatch.setattr("sdforge.exact.random_words", lambda *_, **__: iter([(u * 2**32).long()]))
    base, d = vector(0, 0, 0, 0), vector(1, 2, 3, 4)
    assert dare(base, d, density=0.3).tolist() == [3.3333333333333335, 0, 0, 0]
    assert dare(base, d, density=0.3, rescale=False).tolist() == [1, 0, 0, 0]


def test_a_mask_depends_on_seed_name_and_place_and_on_nothing_else() -> None:
    like = torch.zeros(4000)
    one = drawn(like, 0.5, "sdforge.dare", "0", "unet.x", "1")
    assert torch.equal(one, drawn(like.reshape(40, 100).double(), 0.5, "sdforge.dare", "0", "unet.x", "1").flatten())
    for other in (("1", "unet.x", "1"), ("0", "unet.y", "1"), ("0", "unet.x", "2")):
        both = one == drawn(like, 0.5, "sdforge.dare", *other)
        assert 0.45 < float(both.double().mean()) < 0.55  # 6 σ = 0.047


def test_over_many_seeds_dare_gives_what_nothing_dropped_would() -> None:
    base, model = torch.zeros(50, dtype=torch.float64), torch.ones(50, dtype=torch.float64)
    total = torch.zeros_like(base)
    for seed in range(200):
        total += dare(base, model, density=0.5, seed=seed, tensor="x")
    assert abs(float(total.mean()) / 200 - 1) < 0.06  # 6 σ of 10,000 draws


def test_the_identities_of_dare() -> None:
    assert simplify_dare(["base", "base"], SEEDED) == "base"
    assert simplify_dare(["base", "a"], SEEDED | {"density": 1.0}) == "a"
    kept = simplify_dare(["base", "a", "b"], SEEDED | {"density": 1.0, "weights": [0.5, 0.5]})
    assert not {"seed", "tensor"} & set(kept[1])
    gap = simplify_dare(["base", "a", "b", "c"], SEEDED | {"weights": [0.0, 1.0, 0.0]})
    assert gap == (["base", "base", "b"], SEEDED | {"weights": [0.0, 1.0]})


def test_who_is_left_out_of_dare_leaves_the_masks_of_the_others() -> None:
    base, a, b = torch.zeros(64), torch.ones(64), torch.full((64,), 2.0)
    whole = dare(base, a, b, density=0.5, weights=[0.0, 1.0], seed=1, tensor="x")
    assert torch.equal(dare(base, base, b, density=0.5, weights=[0.0, 1.0], seed=1, tensor="x"), whole)
    assert not torch.equal(dare(base, b, density=0.5, seed=1, tensor="x"), whole)


# -- model stock -------------------------------------------------------------------------------------------------------


def test_t24_model_stock_goes_as_far_as_two_agree() -> None:
    found = model_stock(vector(1, 1), vector(2, 1), vector(2, 2))
    assert torch.allclose(found, vector(1.82842712474619, 1.414213562373095), rtol=1e-15)
    assert model_stock(vector(1, 1), vector(3, 1), vector(0, 1)).tolist() == [1, 1]  # of two opposite ones nothing
    assert model_stock(vector(1, 1), vector(2, 1), vector(0, 2)).tolist() == [1, 1]  # nor of two at more than 90°
    assert model_stock(vector(1, 1), vector(2, 1), vector(1, 3)).tolist() == [1, 1]


def test_model_stock_of_opposites_stays_at_the_base() -> None:
    assert model_stock(vector(1, 1), vector(2, 1), vector(0, 1)).tolist() == [1, 1]
    assert model_stock(vector(1, 1), vector(1, 1), vector(1, 1)).tolist() == [1, 1]


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_goes_as_far_however_little_was_learned(filter_wise: bool) -> None:
    base, learned, apart = (torch.randn(4, 6, generator=torch.Generator().manual_seed(i)).double() for i in range(3))
    large = [base, base + learned, base + learned + apart / 16]
    small = [tensor / 2**40 for tensor in large]
    found = model_stock(*small, filter_wise=filter_wise) * 2**40
    assert torch.allclose(found, model_stock(*large, filter_wise=filter_wise), rtol=1e-12)


def test_filters_go_as_far_as_each_of_them_agrees() -> None:
    """The rows of T24, of orthogonal differences, of opposite ones and of none."""
    base = torch.ones(4, 2, dtype=torch.float64)
    first = torch.tensor([[2, 1], [2, 1], [2, 1], [1, 1]]).double()
    second = torch.tensor([[2, 2], [1, 3], [0, 1], [1, 1]]).double()
    found = model_stock(base, first, second, filter_wise=True)
    assert torch.allclose(found[0], vector(1.82842712474619, 1.414213562373095), rtol=1e-15)
    assert torch.equal(found[1:], base[1:])
    kernels = [tensor.reshape(4, 1, 1, 2) for tensor in (base, first, second)]
    assert torch.equal(model_stock(*kernels, filter_wise=True).reshape(4, 2), found)
    rows = [tensor[0] for tensor in (base, first, second)]
    assert torch.equal(model_stock(*rows, filter_wise=True), model_stock(*rows))  # a bias is one vector


def test_the_identities_of_model_stock() -> None:
    assert simplify_stock(["base", "a", "a"], {}) == "a"
    assert simplify_stock(["base", "base", "base"], {}) == "base"
    assert simplify_stock(["base", "b", "a"], {}) == (["base", "a", "b"], {})


def test_the_identities_of_breadcrumbs() -> None:
    rest = {"weights": [], "density": 1.0, "gamma": 0.01, "vote": "none", "scale": 1.0, "normalize": False}
    assert simplify_breadcrumbs(["base", "a"], rest) == "a"
    assert simplify_breadcrumbs(["base", "a"], rest | {"density": 0.9}) != "a"
    assert simplify_breadcrumbs(["base", "base"], rest | {"density": 0.9}) == "base"


# -- sce and della -----------------------------------------------------------------------------------------------------


def test_t28_sce_weighs_by_energy() -> None:
    base, a, b = vector(0, 0, 0, 0), vector(2, -1, 0, 1), vector(1, 1, 3, -1)
    assert near(sce(base, a, b), 4 / 3, 1, 3, 1)
    assert near(sce(base, a, b, select_topk=0.5), 0, 1, 3, 0)  # of two equal variances the first is used
    base, a, b = vector(0, 0, 0, 0, 0, 0), vector(1, 2, 3, 4, 0, 0), vector(2, 4, 6, 8, 0, 0)
    half = sce(base, a, b, select_topk=0.5)  # of the four that vary
    assert [number != 0 for number in half.tolist()] == [False, False, True, True, False, False]


def test_sce_uses_one_element_at_least() -> None:
    base, a, b = vector(0, 0, 0, 0), vector(1, 2, 4, 3), vector(0, 0, 1, 0)
    assert near(sce(base, a, b, select_topk=0.2), 0, 0, 65 / 17, 0)
    assert torch.equal(sce(base, a, a, select_topk=0.2), base)  # nothing varies


def test_sce_weighs_small_differences_as_it_does_large_ones() -> None:
    """mergekit's weights are equal where the energies sum to less than 1e-6, as those of trained weights do."""
    base, a, b = vector(0, 0), vector(2, 1), vector(1, 3)
    assert torch.equal(sce(base, a / 2**20, b / 2**20) * 2**20, sce(base, a, b))


def test_t38_chances_grow_with_the_rank() -> None:
    (found,) = _chances(vector(3, -1, 5, 2, -4)[None], 0.5, 0.1).tolist()
    assert found == pytest.approx([0.5, 0.4, 0.6, 0.45, 0.55])
    rows = _chances(torch.tensor([[1.0, 2.0], [9.0, 8.0]]), 0.5, 0.25)
    assert rows.tolist() == [[0.25, 0.75], [0.75, 0.25]]
    assert _chances(torch.ones(3, 1), 0.5, 0.25).tolist() == [[0.5]] * 3  # a row of one has no rank


def test_over_many_seeds_della_gives_what_nothing_dropped_would() -> None:
    base, model = torch.zeros(50, dtype=torch.float64), torch.arange(1.0, 51).double()
    total = torch.zeros_like(base)
    for seed in range(200):
        total += della(base, model, density=0.5, epsilon=0.2, vote="none", normalize=False, seed=seed, tensor="x")
    assert abs(float((total / 200 / model).mean()) - 1) < 0.08  # 6 σ of 10,000 draws of σ ≤ 1.3


def test_what_della_never_keeps_is_not_divided_by_its_chance() -> None:
    base, model = torch.zeros(50, dtype=torch.float64), torch.arange(1.0, 51).double()
    found = della(base, model, density=0.15, epsilon=0.15, tensor="x")
    assert found.isfinite().all()
    assert found[0] == 0  # of the smallest the probability is 0


def test_probabilities_of_della_stay_within_their_bounds() -> None:
    rest = {"weights": [], "rescale": True, "vote": "sum", "scale": 1.0, "normalize": True, "seed": 0, "tensor": "x"}
    with pytest.raises(UsageError, match=r"from 0\.1 − 0\.15 to 0\.1 \+ 0\.15"):
        simplify_della(["base", "a"], rest | {"density": 0.1, "epsilon": 0.15})
    with pytest.raises(UsageError, match=r"from 0\.9 − 0\.15 to 0\.9 \+ 0\.15"):
        simplify_della(["base", "a"], rest | {"density": 0.9, "epsilon": 0.15})
    assert simplify_della(["base", "base"], rest | {"density": 0.9, "epsilon": 0.1}) == "base"
