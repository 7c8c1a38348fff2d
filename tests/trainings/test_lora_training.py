"""LoRA: which layers, how they begin, at which pace, and what is saved of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from sdforge.families.sd15.load import load
from sdforge.order import Given
from sdforge.run.adapter import Adapter
from sdforge.run.diffusion import Diffusion
from sdforge.run.states import Stopped
from sdforge.trainings.lora import TABLE
from sdforge.trainings.lora.adapter import begin
from tests.families.workbench import SD15, Taken
from tests.run.order import order, settings, train
from tests.trainings.test_training_contract import batch, parameters, said

ATTENTION = 16  # transformers of Stable Diffusion 1.x


def begun(on: Taken, **changes: Any) -> tuple[Diffusion, Adapter]:
    diffusion = load(on.given(), torch.device("cpu"), torch.float32)
    return diffusion, begin(TABLE.model_construct(**settings("lora", **changes)), diffusion)


def modules(adapter: Adapter) -> set[str]:
    return {name.rpartition(".")[0] for name in adapter.learned().components["lora"]}


def test_the_layers_are_those_of_kohyas_scripts(toy: Taken) -> None:
    """10 linear layers of each transformer's block, with proj_in and proj_out."""
    _, adapter = begun(toy, rank=2)
    assert len(modules(adapter)) == ATTENTION * 12
    assert modules(adapter) <= SD15.modules()


def test_with_conv_rank_the_residual_blocks_and_samplers_are_trained_too(toy: Taken) -> None:
    _, adapter = begun(toy, rank=2, conv_rank=3)
    added = modules(adapter) - modules(begun(toy, rank=2)[1])
    kinds = Counter(module.rpartition(".")[2] for module in added)
    shortcuts = sum(".conv_shortcut.weight" in t.name for t in toy.tables["unet"])
    assert kinds == {"conv1": 22, "conv2": 22, "time_emb_proj": 22, "conv": 6, "conv_shortcut": shortcuts}
    tensors = adapter.learned().components["lora"]
    assert {tensors[f"{m}.lora_down"].shape[0] for m in added if m.endswith(("conv1", "conv2", "conv"))} == {3}
    assert {tensors[f"{m}.lora_down"].shape[0] for m in added if m.endswith(("time_emb_proj", "shortcut"))} == {2}
    assert modules(adapter) <= SD15.modules()


def test_the_text_encoder_is_trained_where_it_is_asked_for(toy: Taken) -> None:
    _, adapter = begun(toy, text_encoder=True, text_learning_rate=2e-5)
    text = {module for module in modules(adapter) if module.startswith("text_encoder.text_model.encoder.layers.")}
    assert len(text) == 2 * 6
    assert not adapter.text_is_frozen
    rates = [group.learning_rate for group in adapter.groups()]
    assert rates == [1e-4, 2e-5]
    assert modules(adapter) <= SD15.modules()


def test_up_begins_at_zero_and_down_in_kaimings_bounds(toy: Taken) -> None:
    _, adapter = begun(toy, rank=4, conv_rank=2)
    for name, tensor in adapter.learned().components["lora"].items():
        if name.endswith("lora_up"):
            assert not tensor.any()
        else:
            bound = tensor[0].numel() ** -0.5
            assert 0.5 * bound < float(tensor.abs().max()) <= bound


@pytest.mark.parametrize("more", [{}, {"conv_rank": 2, "text_encoder": True}])
def test_at_first_every_up_has_a_gradient_and_no_down(more: dict[str, Any], toy: Taken) -> None:
    diffusion, adapter = begun(toy, rank=2, **more)
    (said(diffusion, adapter) - batch().target_BCHW).square().mean().backward()  # type: ignore[no-untyped-call]
    for name, parameter in parameters(adapter).items():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == name.endswith("lora_up"), name


@pytest.mark.parametrize(
    ("given", "alpha", "conv_alpha"),
    [({}, 4.0, 2.0), ({"alpha": 1.0}, 1.0, 2.0), ({"alpha": 1.0, "conv_alpha": 0.5}, 1.0, 0.5)],
)
def test_alpha_is_the_rank_unless_it_is_stated(
    given: dict[str, float], alpha: float, conv_alpha: float, toy: Taken
) -> None:
    _, adapter = begun(toy, rank=4, conv_rank=2, **given)
    facts: Any = adapter.learned().facts
    if not given:
        assert facts == {}
    else:
        found = {module.rpartition(".")[2]: value for module, value in facts["alpha"].items()}
        assert (found["to_q"], found["conv1"]) == (alpha, conv_alpha)


def test_half_the_alpha_is_half_the_update(toy: Taken) -> None:
    effects = []
    with torch.no_grad():
        for alpha in (0.0, 2.0, 4.0):
            diffusion, adapter = begun(toy, rank=4, alpha=alpha or 1.0)
            for name, parameter in parameters(adapter).items():
                if name.endswith("lora_up"):
                    parameter.add_(1e-3 * alpha)
                    parameter.div_(alpha or 1.0)
            effects.append(said(diffusion, adapter))
    small, large = ((effect - effects[0]).norm() for effect in effects[1:])
    assert float(large / small) == pytest.approx(2, rel=0.05)


def test_the_loss_falls_on_three_drawings(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    easy: dict[str, Any] = {"rank": 4, "conv_rank": 4, "noise_from": 900, "min_snr": 0.0, "schedule": "constant"}
    wanted = order(tmp_path, "lora", toy, pictures, steps=30, learning_rate=2e-2, **easy)
    losses = train(wanted).record["losses"]
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


def test_divided_by_the_root_of_the_rank_it_is_kept_for_readers_that_divide_by_the_rank(toy: Taken) -> None:
    """s = α/√r (Kalajdzievski 2023, eq. 4): α·√r is what α/r needs to say that."""
    _, adapter = begun(toy, rank=4, alpha=3.0, rslora=True)
    assert adapter.learned().facts == {"alpha": 6.0}
    _, adapter = begun(toy, rank=4, conv_rank=9, alpha=3.0, conv_alpha=1.0, rslora=True)
    facts: Any = adapter.learned().facts
    found = {module.rpartition(".")[2]: value for module, value in facts["alpha"].items()}
    assert (found["to_q"], found["conv1"]) == (6.0, 3.0)


def test_up_learns_faster_than_down_by_the_ratio_that_is_asked_for(toy: Taken) -> None:
    _, adapter = begun(toy, rank=2, text_encoder=True, learning_rate=1e-3, text_learning_rate=1e-4, plus=16.0)
    rates = {name: group.learning_rate for group in adapter.groups() for name in group.parameters}
    assert len(rates) == len(parameters(adapter)) == 2 * (ATTENTION * 12 + 12)
    for name, rate in rates.items():
        own = 1e-3 if name.startswith("unet") else 1e-4
        assert rate == pytest.approx(16 * own if name.endswith("lora_up") else own), name


def test_magnitudes_begin_as_the_lengths_of_rows_and_learn(toy: Taken) -> None:
    diffusion, adapter = begun(toy, rank=2, conv_rank=2, text_encoder=True, dora=True)
    tensors = adapter.learned().components["lora"]
    names = [name for name in tensors if name.endswith(".dora_scale")]
    assert len(names) == len(modules(adapter)) == len(tensors) / 3
    weights = {
        f"{part}.{name}": tensor for part in ("unet", "text_encoder") for name, tensor in toy.tensors(part).items()
    }
    for name in names:
        weight = weights[name.removesuffix(".dora_scale") + ".weight"].float()
        assert torch.allclose(tensors[name], weight.flatten(1).norm(dim=1, keepdim=True), rtol=1e-6), name
    (said(diffusion, adapter) - batch().target_BCHW).square().mean().backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in parameters(adapter).items()}
    assert all(g is not None and bool(g.any()) for n, g in gradients.items() if n.endswith(("lora_up", "dora_scale")))


@pytest.mark.parametrize(
    "more", [{"dora": True}, {"plus": 4.0}, {"rslora": True}, {"preserve": "cat", "trigger": "red"}]
)
def test_a_training_of_a_variant_that_stops_goes_on_to_the_same_bits(
    more: dict[str, Any], toy: Taken, pictures: Given, tmp_path: Path
) -> None:
    one = train(order(tmp_path / "a", "lora", toy, pictures, steps=2, rank=2, **more))
    calls = iter([False, True])
    halted = order(tmp_path / "b", "lora", toy, pictures, steps=2, rank=2, **more)
    with pytest.raises(Stopped):
        train(halted, lambda: next(calls))
    assert train(halted).sha256 == one.sha256
