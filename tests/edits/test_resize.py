"""Resizing: the best LoRA of fewer ranks, the same LoRA where nothing is dropped, plain LoRA of its relatives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdforge.errors import ActionFailed
from sdforge.formats.lora import alpha_of
from sdforge.run.low_rank import of_matrix, of_product, rank_of
from tests.edits.low_ranks import RANKS, resized
from tests.edits.test_bake import baked, weights
from tests.edits.test_bake_forms import FLAT, KERNEL, NARROW, shape
from tests.edits.test_bake_forms import kept as kept_form
from tests.families.forms import CASES, MERELY_ADDED, WIDE, changed, random_factors
from tests.families.loras import DOWN, LINEAR, Factors, kept_lora, random_lora
from tests.families.workbench import Taken, keep, same_bytes

ADDED = [name for name in (*CASES, *WIDE) if name in MERELY_ADDED and not name.startswith(("glora", "ia3"))]
OTHERS = [name for name in CASES if name not in ADDED]
SPECTRUM = (8.0, 4.0, 2.0, 1.0)  # squares: 64, 16, 4, 1


def with_spectrum(values: tuple[float, ...] = SPECTRUM, *, alpha: float = 2.0, seed: int = 0) -> Factors:
    """Return factors whose product times alpha / rank has these singular values, badly balanced and correlated."""
    draw, rank = torch.Generator().manual_seed(seed), len(values)
    left, _ = torch.linalg.qr(torch.randn(8, rank, generator=draw, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(8, rank, generator=draw, dtype=torch.float64))
    mixed = torch.randn(rank, rank, generator=draw, dtype=torch.float64)
    up = 100 * left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ mixed * rank / alpha
    return Factors(up.float(), (torch.linalg.inv(mixed) @ right.T / 100).float(), alpha)


def update(lora: Taken, module: str) -> Tensor:
    """Return alpha / rank · up @ down in fp64."""
    tensors = lora.tensors("lora")
    up, down = tensors[f"{module}.lora_up"].double(), tensors[f"{module}.lora_down"].double()
    return alpha_of(lora.artifact.facts, module, len(down)) / len(down) * up @ down.flatten(1)


def rank(lora: Taken, module: str = LINEAR) -> int:
    return len(lora.tensors("lora")[f"{module}.lora_down"])


def test_a_smaller_rank_is_the_best_there_is(tmp_path: Path) -> None:
    """What is missing has the norm of the dropped singular values (Eckart & Young), here √(4 + 1)."""
    lora = kept_lora(tmp_path / "a", {LINEAR: with_spectrum()})
    small = resized(tmp_path / "b", lora, rank=2)
    missing = update(lora, LINEAR) - update(small, LINEAR)
    assert rank(small) == 2
    assert float(missing.norm()) == pytest.approx(5**0.5, rel=1e-5)
    assert small.artifact.facts == {}  # alpha is the rank


def test_factors_are_of_one_size_whatever_they_were(tmp_path: Path) -> None:
    tensors = resized(tmp_path / "b", kept_lora(tmp_path / "a", {LINEAR: with_spectrum()}), rank=3).tensors("lora")
    ups, downs = tensors[f"{LINEAR}.lora_up"].norm(dim=0), tensors[f"{LINEAR}.lora_down"].norm(dim=1)
    assert torch.allclose(ups, downs, rtol=1e-5)
    assert torch.allclose(ups * downs, torch.tensor(SPECTRUM[:3]), rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"rank": 3}, 3),
        ({"energy": 0.75}, 1),  # 64 of 85
        ({"energy": 0.76}, 2),
        ({"energy": 80 / 85 + 1e-4}, 3),
        ({"energy": 0.0}, 1),
        ({"threshold": 1.5}, 3),
        ({"relative_threshold": 0.4}, 2),
        ({"rank": 3, "energy": 0.76}, 2),
        ({"rank": 1, "energy": 0.99}, 1),
    ],
)
def test_every_setting_says_how_much_is_kept_and_the_least_counts(
    settings: dict[str, float], kept: int, tmp_path: Path
) -> None:
    lora = kept_lora(tmp_path / "a", {LINEAR: with_spectrum()})
    assert rank(resized(tmp_path / "b", lora, **settings)) == kept


def test_where_nothing_is_dropped_a_module_stays_as_it_is(toy: Taken, tmp_path: Path) -> None:
    """Its alpha too: 1.5 where the rank is 2, while what was cut has its rank."""
    lora = random_lora(toy, (LINEAR, DOWN), alphas=(1.5,))
    small = resized(tmp_path / "b", kept_lora(tmp_path / "a", lora), rank=2, dtype="")
    tensors, facts = small.tensors("lora"), small.artifact.facts
    assert same_bytes(tensors[f"{LINEAR}.lora_up"], lora[LINEAR].up)
    assert same_bytes(tensors[f"{LINEAR}.lora_down"], lora[LINEAR].down)
    assert rank(small, DOWN) == 2
    assert facts == {"alpha": {LINEAR: 1.5, DOWN: 2.0}}


def test_ranks_that_say_nothing_are_dropped_exactly(tmp_path: Path) -> None:
    """Two of four ranks are sums of the others."""
    factors = with_spectrum((8.0, 4.0, 0.0, 0.0))
    small = resized(tmp_path / "b", kept_lora(tmp_path / "a", {LINEAR: factors}), rank=2)
    assert torch.allclose(update(small, LINEAR), factors.update, atol=1e-5)


def test_convolutions_have_a_rank_of_their_own(toy: Taken, tmp_path: Path) -> None:
    lora = kept_lora(tmp_path / "a", random_lora(toy, (LINEAR, DOWN)))
    small = resized(tmp_path / "b", lora, rank=1, conv_rank=3)
    assert (rank(small), rank(small, DOWN)) == (1, 3)
    assert small.tensors("lora")[f"{DOWN}.lora_down"].shape == (3, 8, 3, 3)
    without = resized(tmp_path / "c", lora, rank=1, conv_rank=0)
    assert {name.rpartition(".")[0] for name in without.tensors("lora")} == {LINEAR}


@pytest.mark.parametrize("name", ADDED)
def test_every_form_that_is_merely_added_becomes_a_plain_lora(name: str, toy: Taken, tmp_path: Path) -> None:
    """Of the whole rank it changes the same: to 10⁻⁵ of the change, as fp32 factors and the Gram matrix leave it."""
    before, case = weights(toy), (CASES | WIDE)[name]
    places = (KERNEL,) if name in WIDE else (FLAT, NARROW, KERNEL)
    plain = resized(tmp_path / "b", kept_form(tmp_path / "a", places, case, before))
    assert {factor.rpartition(".")[2] for factor in plain.tensors("lora")} == {"lora_up", "lora_down"}
    result = baked(toy, [(plain, 1.0)], "fp32")
    for i, module in enumerate(places):
        weight = before[f"{module}.weight"].double()
        small = weight.reshape(shape(before, module))
        expected = changed(case, small, random_factors(case, tuple(small.shape), seed=i)).reshape(weight.shape)
        error = result[f"{module}.weight"].double() - expected
        assert float(error.norm() / (expected - weight).norm()) < 1e-5


@pytest.mark.parametrize("name", OTHERS)
def test_a_form_that_needs_the_weight_is_refused_with_the_way_out(name: str, toy: Taken, tmp_path: Path) -> None:
    lora = kept_form(tmp_path / "a", (FLAT,), CASES[name], weights(toy))
    with pytest.raises(ActionFailed, match=FLAT) as caught:
        resized(tmp_path / "b", lora)
    assert "`extract` the difference" in caught.value.hint


def test_differences_of_biases_and_norms_stay(tmp_path: Path) -> None:
    tensors = {"unet.conv_in.diff_b": torch.randn(8), "unet.conv_norm_out.w_norm": torch.randn(8)}
    small = resized(tmp_path / "b", keep(tmp_path / "a", {"lora": tensors}, kind="lora"), rank=1)
    assert all(same_bytes(tensor, tensors[name]) for name, tensor in small.tensors("lora").items())
    assert len(small.tensors("lora")) == 2


def test_where_nothing_is_left_it_is_said(tmp_path: Path) -> None:
    lora = kept_lora(tmp_path / "a", {LINEAR: with_spectrum()})
    with pytest.raises(ActionFailed, match="nothing is left"):
        resized(tmp_path / "b", lora, threshold=100.0)


@pytest.mark.parametrize("settings", [{"rank": 1}, {"rank": 0, "energy": 0.5}])
def test_a_lora_that_changes_nothing_is_called_so(settings: dict[str, float], tmp_path: Path) -> None:
    """No rank or energy leaves anything of it; it has an alpha of 0, or was never trained."""
    factors = with_spectrum()
    untrained = factors._replace(up=torch.zeros_like(factors.up))
    for name, lora in (("untrained", untrained), ("silent", factors._replace(alpha=0.0))):
        with pytest.raises(ActionFailed, match="all its updates are zero") as caught:
            resized(tmp_path / f"{name}-b", kept_lora(tmp_path / name, {LINEAR: lora}), **settings)
        assert caught.value.hint == "leave it out"


def test_broken_factors_stop_with_their_name(tmp_path: Path) -> None:
    factors = with_spectrum()
    factors.up[0, 0] = float("nan")
    with pytest.raises(ActionFailed, match=rf"{LINEAR}\.lora_up holds NaN or Inf"):
        resized(tmp_path / "b", kept_lora(tmp_path / "a", {LINEAR: factors}))


def test_the_same_order_makes_the_same_bytes(toy: Taken, tmp_path: Path) -> None:
    lora = kept_lora(tmp_path / "a", random_lora(toy))
    one, two = (resized(tmp_path / name, lora, rank=1) for name in "bc")
    assert one.artifact.digest == two.artifact.digest


def test_both_ways_of_decomposing_agree() -> None:
    draw = torch.Generator().manual_seed(0)
    up, down = (torch.randn(*size, generator=draw, dtype=torch.float64) for size in ((40, 6), (6, 70)))
    for matrix in (up @ down, (up @ down).T):
        whole = of_matrix(matrix)
        assert len(whole.values_N) == 6
        assert torch.allclose(whole.left_ON * whole.values_N @ whole.right_NF, matrix, atol=1e-10)
        assert torch.allclose(whole.values_N, torch.linalg.svdvals(matrix)[:6], rtol=1e-10)
    thin, full = of_product(up, down), of_matrix(up @ down)
    assert torch.allclose(thin.values_N, full.values_N, rtol=1e-10)
    assert torch.allclose(thin.left_ON, full.left_ON, atol=1e-6)  # signs too
    assert rank_of(thin.values_N, RANKS, 4) == 4
