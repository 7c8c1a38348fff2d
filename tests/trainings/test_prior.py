"""Prior preservation, a setting of every training: two means, each of its own pictures, noises and timesteps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdforge.families.sd15.load import load
from sdforge.method import module_of
from sdforge.order import Given
from sdforge.run.adapter import Batch
from sdforge.run.train import _Training
from tests.families.workbench import Taken
from tests.run.order import order, train

EACH = pytest.mark.parametrize("name", ["dreambooth", "lora", "textual_inversion"])
WEIGHT, GAMMA = 0.7, 5.0


@pytest.fixture
def prior(pictures: Given) -> Given:
    """The class: pictures with words of their own."""
    rows = [
        [path, sha, f"a {word}", 1] for (path, sha, *_), word in zip(pictures.pictures, ("cat", "house"), strict=False)
    ]
    return dataclasses.replace(pictures, identity="class", pictures=rows)


def begun(name: str, toy: Taken, pictures: Given, work: Path, **changes: Any) -> _Training:
    fixed: dict[str, Any] = {"clip": 0.0, "min_snr": GAMMA, "prior_weight": WEIGHT, "caption_dropout": 0.0}
    wanted = order(work, name, toy, pictures, **fixed | changes)
    diffusion = load(wanted.the("on"), torch.device("cpu"), torch.float32)
    settings = module_of("trainings", name).TABLE.model_construct(**wanted.settings)
    adapter = module_of("trainings", f"{name}.adapter").begin(settings, diffusion)
    return _Training(wanted, settings, diffusion, adapter, wanted.the("on"))


def mean(training: _Training, batch: Batch) -> Tensor:
    """The loss of one half alone: min(SNR, γ)/SNR · mean square, from the schedule's ᾱ themselves."""
    diffusion = training.diffusion
    with torch.set_grad_enabled(True):
        text = diffusion.encode_text(batch.captions)
        predicted = training.adapter.predict(batch, text)
    alphas = diffusion.schedule.alphas_T[batch.timesteps_B]
    snr = alphas / (1 - alphas)
    error_B = (predicted - batch.target_BCHW).square().mean((1, 2, 3))
    return (error_B * snr.clamp(max=GAMMA) / snr).mean()


@EACH
def test_the_loss_is_two_means_and_its_gradient_the_sum_of_two(
    name: str, toy: Taken, pictures: Given, prior: Given, tmp_path: Path
) -> None:
    training = begun(name, toy, pictures, tmp_path, prior=prior, batch=4)
    batches = [training.batches.make(shown, 0) for shown in training.shown]
    halves = [mean(training, batch) for batch in batches]
    parameters = list(training.parameters.values())
    each = [torch.autograd.grad(half, parameters, allow_unused=True, materialize_grads=True) for half in halves]
    loss = training._step(0)
    assert loss == pytest.approx(float((halves[0] + WEIGHT * halves[1]).detach()), abs=1e-6)
    expected = torch.cat([(a + WEIGHT * b).flatten() for a, b in zip(*each, strict=True)])
    found = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in parameters])
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_each_half_is_weighted_by_its_own_timesteps(toy: Taken, pictures: Given, prior: Given, tmp_path: Path) -> None:
    """Its pictures in another order are the same half; the other half's timesteps are another loss."""
    training = begun("dreambooth", toy, pictures, tmp_path, prior=prior, batch=4)
    subject, kept = (training.batches.make(shown, 0) for shown in training.shown)
    order_B = [2, 0, 3, 1]
    mixed = Batch(
        kept.noisy_BCHW[order_B],
        kept.target_BCHW[order_B],
        kept.timesteps_B[order_B],
        [kept.captions[i] for i in order_B],
        pictures=[kept.pictures[i] for i in order_B],
    )
    assert sorted(subject.timesteps_B.tolist()) != sorted(kept.timesteps_B.tolist())
    with torch.no_grad():
        one, same = (float(training._loss([subject, half]).mean()) for half in (kept, mixed))
        other = float(training._loss([subject, dataclasses.replace(kept, timesteps_B=subject.timesteps_B)]).mean())
    assert same == pytest.approx(one, abs=1e-6)
    assert other != pytest.approx(one, abs=1e-3)


def test_a_step_in_parts_has_the_gradient_of_the_whole(
    toy: Taken, pictures: Given, prior: Given, tmp_path: Path
) -> None:
    gradients = []
    for micro in (4, 2):
        training = begun("fine_tune", toy, pictures, tmp_path / str(micro), prior=prior, batch=4)
        training.micro_batch = micro
        training._step(0)
        gradients.append(torch.cat([p.grad.flatten() for p in training.parameters.values() if p.grad is not None]))
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-5


@EACH
def test_a_prior_of_no_weight_changes_nothing(
    name: str, toy: Taken, pictures: Given, prior: Given, tmp_path: Path
) -> None:
    """What is learned from, its noises and their timesteps do not depend on what is kept beside it."""
    more: dict[str, Any] = {"steps": 2, "learning_rate": 1e-3, "caption_dropout": 0.0}
    alone = train(order(tmp_path / "a", name, toy, pictures, **more)).record["losses"]
    beside = train(order(tmp_path / "b", name, toy, pictures, prior=prior, prior_weight=0.0, **more)).record["losses"]
    weighed = train(order(tmp_path / "c", name, toy, pictures, prior=prior, prior_weight=1.0, **more)).record["losses"]
    assert beside == pytest.approx(alone, rel=1e-5)
    assert all(c > 1.2 * a for a, c in zip(alone, weighed, strict=True))


def test_the_numbers_of_pictures_are_no_matter(toy: Taken, pictures: Given, prior: Given, tmp_path: Path) -> None:
    """A class of one picture fills its half of every batch."""
    few = dataclasses.replace(prior, pictures=prior.pictures[:1])
    training = begun("lora", toy, pictures, tmp_path, prior=few, batch=4)
    subject, kept = (training.batches.make(shown, 0) for shown in training.shown)
    assert len(kept.captions) == len(subject.captions) == 4
    assert len(set(kept.timesteps_B.tolist())) > 1
