"""The training of hypernetworks: where it begins, what it trains, and that nothing is drawn but by seed and step."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from sdforge.artifact import Artifact
from sdforge.families.sd15.load import load
from sdforge.formats.hypernetwork import ACTIVATIONS
from sdforge.order import Given
from sdforge.run.adapter import Adapter
from sdforge.run.diffusion import Diffusion
from sdforge.run.hypernetwork import attach
from sdforge.run.states import Stopped
from sdforge.trainings.hypernetwork import TABLE, advise, facts
from sdforge.trainings.hypernetwork.adapter import begin
from tests.families.workbench import Taken
from tests.run.order import order, settings, train
from tests.trainings.test_training_contract import CAPTIONS, batch, parameters, said


def begun(on: Taken, **changes: Any) -> tuple[Diffusion, Adapter]:
    diffusion = load(on.given(), torch.device("cpu"), torch.float32)
    return diffusion, begin(TABLE.model_construct(**settings("hypernetwork", **changes)), diffusion)


def table(**changes: Any) -> Any:
    return TABLE.model_validate({"on": "base", "dataset": "drawings"} | changes)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_first_step_predicts_as_the_base_does_to_the_bit(activation: str, layer_norm: bool, toy: Taken) -> None:
    base = load(toy.given(), torch.device("cpu"), torch.float32)
    diffusion, adapter = begun(toy, activation=activation, layer_norm=layer_norm, attention="all")
    one = batch()
    with torch.no_grad():
        plain = base.predict(one.noisy_BCHW, one.timesteps_B, base.encode_text(CAPTIONS))
        assert torch.equal(said(diffusion, adapter), plain)
    (said(diffusion, adapter) - one.target_BCHW).square().mean().backward()  # type: ignore[no-untyped-call]
    moved = {name for name, p in parameters(adapter).items() if p.grad is not None and bool(p.grad.any())}
    last = "norm.1.weight" if layer_norm else "linear.1.weight"
    assert {f"{width}.{side}.{last}" for width in (8, 16) for side in "kv"} <= moved


def test_noise_as_a1111_begins_with_it_would_have_changed_the_base(toy: Taken) -> None:
    """Its last layer is drawn too, N(0, 0.01): people saw noise with anything but small learning rates."""
    diffusion, adapter = begun(toy)
    with torch.no_grad():
        before = said(diffusion, adapter)
        for name, parameter in parameters(adapter).items():
            if name.endswith("weight"):
                parameter.normal_(0, 0.01, generator=torch.Generator().manual_seed(0))
        assert not torch.equal(said(diffusion, adapter), before)


def test_networks_are_those_of_the_structure_for_every_width(toy: Taken) -> None:
    cross = parameters(begun(toy, structure=[1, 3, 2, 1])[1])
    assert {name.partition(".")[0] for name in cross} == {"16"}
    assert [tuple(cross[f"16.k.linear.{i}.weight"].shape) for i in range(3)] == [(48, 16), (32, 48), (16, 32)]
    everywhere = parameters(begun(toy, attention="all")[1])
    assert {name.partition(".")[0] for name in everywhere} == {"8", "16"}


def test_what_is_saved_does_attached_what_it_did_in_training(toy: Taken) -> None:
    for changes in ({"activation": "tanh", "layer_norm": True}, {"attention": "all"}):
        diffusion, adapter = begun(toy, **changes)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in parameters(adapter).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
            theirs = said(diffusion, adapter)
        learned = adapter.learned()
        ours = load(toy.given(), torch.device("cpu"), torch.float32)
        attach(ours.unet, {n: t.detach() for n, t in learned.components["hypernetwork"].items()}, learned.facts)
        one = batch()
        with torch.no_grad():
            assert torch.equal(ours.predict(one.noisy_BCHW, one.timesteps_B, ours.encode_text(CAPTIONS)), theirs)


def test_dropout_depends_on_seed_step_and_place_and_is_for_learning_alone(toy: Taken) -> None:
    diffusion, adapter = begun(toy, dropout=0.5, activation="relu")
    with torch.no_grad():
        for parameter in parameters(adapter).values():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
        plain = said(diffusion, adapter)
        assert torch.equal(said(diffusion, adapter), plain)
    adapter.begins(1)
    first, again = said(diffusion, adapter), said(diffusion, adapter)
    assert torch.equal(first, again)
    assert not torch.equal(first, plain)
    adapter.begins(2)
    assert not torch.equal(said(diffusion, adapter), first)


def test_a_training_that_stops_and_goes_on_ends_with_the_same_bits(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 10, "dropout": 0.3, "activation": "swish", "attention": "all", "warmup": 3}
    state = torch.random.get_rng_state()
    straight = train(order(tmp_path / "straight", "hypernetwork", toy, pictures, **changes))
    assert torch.equal(state, torch.random.get_rng_state())
    broken = order(tmp_path / "broken", "hypernetwork", toy, pictures, **changes)
    counted = itertools.count()
    with pytest.raises(Stopped):
        train(broken, lambda: next(counted) == 4)
    resumed = train(broken)
    assert resumed.sha256 == straight.sha256
    assert resumed.record["losses"] == straight.record["losses"]
    assert resumed.facts == {"structure": [1.0, 2.0, 1.0], "activation": "swish"}


def test_a_budget_of_memory_trains_the_same_dropout(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 3, "dropout": 0.3, "batch": 2}
    plain = train(order(tmp_path / "plain", "hypernetwork", toy, pictures, **changes))
    tight = train(order(tmp_path / "tight", "hypernetwork", toy, pictures, how={"vram": 30_000_000}, **changes))
    assert "fits" in tight.record
    assert tight.record["losses"] == pytest.approx(plain.record["losses"], rel=0.1)


def test_what_it_will_be_is_known_before_it_is_trained() -> None:
    assert facts(table()) == {"structure": [1.0, 2.0, 1.0], "attention": "cross"}
    everything = table(structure=[1, 1], activation="elu", layer_norm=True, attention="all")
    assert facts(everything) == {"structure": [1.0, 1.0], "activation": "elu", "layer_norm": True}


@pytest.mark.parametrize("structure", [[1], [1, 2], [2, 1], [1, 65, 1], [1, 0, 1], []])
def test_a_structure_that_does_not_end_as_it_begins_is_refused(structure: list[float]) -> None:
    with pytest.raises(ValidationError):
        table(structure=structure)


def test_a_checkpoint_of_any_family_with_cross_attention_serves() -> None:
    for name in ("sd15", "sd2", "sdxl", "unclip", "image_variations"):
        assert advise(table(), {"on": [Artifact("checkpoint", name)]}) == []
