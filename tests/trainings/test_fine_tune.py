"""Fine-tuning: the chosen weights move, all else stays, and small steps are not lost in bf16."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdforge.artifact import Artifact
from sdforge.errors import UsageError
from sdforge.families.sd15.load import load
from sdforge.order import Given, Outcome
from sdforge.run.adapter import Adapter
from sdforge.run.diffusion import Diffusion
from sdforge.run.optimizers import BETAS, EPS, RoundedAdamW, rounded_by_chance
from sdforge.run.seeds import generator
from sdforge.run.speed import shrink
from sdforge.run.states import Stopped
from sdforge.run.tensors import load as read
from sdforge.trainings.fine_tune import TABLE, advise, chosen
from sdforge.trainings.fine_tune.adapter import begin
from tests.families.workbench import SD15, Ref, Taken, digest
from tests.run.order import order, settings, state_size, train
from tests.trainings.test_training_contract import parameters

UNET = 684  # tensors of the toy's U-Net
TEXT = 36
BF16: dict[str, Any] = {"weights": "bf16", "precision": "bf16"}


def begun(on: Taken, **changes: Any) -> tuple[Diffusion, Adapter]:
    diffusion = load(on.given(), torch.device("cpu"), torch.float32)
    return diffusion, begin(TABLE.model_construct(**settings("fine_tune", **changes)), diffusion)


def tensors(outcome: Outcome, work: Path, component: str = "unet") -> dict[str, Tensor]:
    pack = str(work / outcome.pack)
    return {
        name: read(Ref(name, dtype, tuple(shape), pack, offset, xxh3))
        for name, dtype, shape, _, xxh3, offset in outcome.components[component]
    }


def stop_before(step: int) -> Callable[[], bool]:
    counted = itertools.count()
    return lambda: next(counted) == step


# -- what learns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"train": ["unet.mid"]}, ("mid_block.",)),
        ({"train": ["M00", "unet.out"]}, ("mid_block.", "conv_norm_out.", "conv_out.")),
        ({"train": ["unet.mid"], "layers": "attention"}, ("mid_block.attentions.0.transformer_blocks.0.attn",)),
        ({"train": ["unet.mid"], "layers": "cross_attention"}, ("mid_block.attentions.0.transformer_blocks.0.attn2",)),
    ],
)
def test_blocks_and_layers_say_what_learns(changes: dict[str, Any], parts: tuple[str, ...], toy: Taken) -> None:
    diffusion, adapter = begun(toy, **changes)
    wanted = {name for name, _ in diffusion.unet.named_parameters() if name.startswith(parts)}
    assert set(parameters(adapter)) == wanted
    assert wanted


def test_all_of_the_u_net_learns_unless_it_is_said(toy: Taken) -> None:
    diffusion, adapter = begun(toy)
    assert set(parameters(adapter)) == {name for name, _ in diffusion.unet.named_parameters()}
    assert adapter.text_is_frozen


def test_every_attention_has_its_cross_attention(toy: Taken) -> None:
    both, cross = (set(parameters(begun(toy, layers=layers)[1])) for layers in ("attention", "cross_attention"))
    assert len(both) == 2 * len(cross) == 2 * 16 * 5  # 16 transformers; q, k, v, out and its bias


def test_the_text_encoder_has_a_rate_of_its_own(toy: Taken) -> None:
    _, adapter = begun(toy, text_encoder=True, text_learning_rate=3e-7)
    assert not adapter.text_is_frozen
    assert [(len(g.parameters), g.learning_rate) for g in adapter.groups()] == [(UNET, 1e-5), (TEXT, 3e-7)]


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "components"), [({}, {"unet": UNET}), ({"text_encoder": True}, {"unet": UNET, "text_encoder": TEXT})]
)
def test_a_result_has_whole_components_and_only_those_that_changed(
    changes: dict[str, Any], components: dict[str, int], toy: Taken, pictures: Given, tmp_path: Path
) -> None:
    rates: dict[str, Any] = {"steps": 2, "learning_rate": 1e-2, "text_learning_rate": 1e-2, "dtype": "fp32"}
    outcome = train(order(tmp_path, "fine_tune", toy, pictures, **rates, **changes))
    assert {name: len(rows) for name, rows in outcome.components.items()} == components
    for component in components:
        before, after = toy.tensors(component), tensors(outcome, tmp_path, component)
        assert before.keys() == after.keys()
        assert all(before[name].shape == after[name].shape for name in before)
        assert not any(torch.equal(before[name].float(), after[name]) for name in before)


def test_what_did_not_learn_keeps_its_bytes(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    some: dict[str, Any] = {"train": ["unet.mid"], "learning_rate": 1e-2, "steps": 2}
    kept = tensors(train(order(tmp_path / "a", "fine_tune", toy, pictures, **some)), tmp_path / "a")
    exact = tensors(train(order(tmp_path / "b", "fine_tune", toy, pictures, dtype="fp32", **some)), tmp_path / "b")
    before, learned = toy.tensors("unet"), chosen(TABLE.model_construct(**settings("fine_tune", **some)), SD15)
    assert {n for n in before if not torch.equal(before[n].float(), exact[n])} == learned & before.keys()
    assert all(digest(before[n]) == digest(kept[n]) for n in before.keys() - learned)


def test_what_did_not_learn_keeps_its_bytes_where_frozen_weights_are_kept_small(
    toy: Taken, pictures: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the matrices that do not learn are held in bf16, three bits less than they have here."""

    def tuned(diffusion: Diffusion, trained: set[nn.Parameter], **_: Any) -> list[str]:
        return [shrink([diffusion.unet], trained, torch.bfloat16)]

    monkeypatch.setattr("sdforge.run.train.tune", tuned)
    wanted = order(tmp_path, "fine_tune", toy, pictures, train=["unet.mid"], steps=1, precision="bf16")
    found, before = tensors(train(wanted), tmp_path), toy.tensors("unet")
    changed = {name for name in before if digest(found[name]) != digest(before[name])}
    assert changed
    assert all(name.startswith("mid_block.") for name in changed)


def test_the_norm_is_that_of_what_changed(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    wanted = order(tmp_path, "fine_tune", toy, pictures, steps=2, learning_rate=1e-3, dtype="fp32", text_encoder=True)
    outcome = train(wanted)
    squares = 0.0
    for component in outcome.components:
        before = toy.tensors(component)
        after = tensors(outcome, tmp_path, component)
        squares += sum(float((after[n].double() - before[n].double()).square().sum()) for n in before)
    assert outcome.record["norm"] == pytest.approx(squares**0.5, rel=1e-5)


# -- how it learns -----------------------------------------------------------------------------------------------------


def test_the_loss_falls_on_three_drawings(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    easy: dict[str, Any] = {"noise_from": 900, "min_snr": 0.0, "caption_dropout": 0.0, "learning_rate": 1e-2}
    losses = train(order(tmp_path, "fine_tune", toy, pictures, steps=40, batch=4, **easy)).record["losses"]
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])


def state_bytes(toy: Taken, **changes: Any) -> int:
    """What the plan says of it."""
    shapes = {name: {n: tuple(t.shape) for n, t in toy.tensors(name).items()} for name in ("unet", "text_encoder")}
    table: Any = TABLE.model_construct(**settings("fine_tune", **changes))
    return int(table.state_bytes(SD15, shapes))


@pytest.mark.parametrize("changes", [{"text_encoder": True, "ema": 0.9}, {**BF16, "text_encoder": True}])
def test_a_fine_tuning_that_stops_and_goes_on_ends_with_the_same_bits(
    changes: dict[str, Any], toy: Taken, pictures: Given, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"steps": 6, "schedule": "cosine", "learning_rate": 1e-3, "flip": True, **changes}
    straight = train(order(tmp_path / "straight", "fine_tune", toy, pictures, **more))
    broken = order(tmp_path / "broken", "fine_tune", toy, pictures, **more)
    with pytest.raises(Stopped):
        train(broken, stop_before(3))
    assert state_size(Path(broken.states)) == state_bytes(toy, **more)
    resumed = train(broken)
    assert resumed.record["resumed"] == [{"step": 3}]
    assert resumed.sha256 == straight.sha256
    assert resumed.record["losses"] == straight.record["losses"]


def test_an_average_is_what_its_formula_says_after_three_steps(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    """e ← d e + (1 − d) w, with d = min(ema, (1 + step) / (10 + step))."""
    some: dict[str, Any] = {"train": ["unet.mid"], "learning_rate": 1e-2, "dtype": "fp32"}
    weights = [
        tensors(train(order(tmp_path / str(n), "fine_tune", toy, pictures, steps=n, **some)), tmp_path / str(n))
        for n in (1, 2, 3)
    ]
    averaged = tensors(
        train(order(tmp_path / "e", "fine_tune", toy, pictures, steps=3, ema=0.15, **some)), tmp_path / "e"
    )
    for name, start in toy.tensors("unet").items():
        expected = start.double()
        for step, after in enumerate(weights):
            decay = min(0.15, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * after[name].double()
        assert torch.allclose(averaged[name].double(), expected, atol=1e-6), name


# -- bf16 --------------------------------------------------------------------------------------------------------------


def test_steps_smaller_than_bf16_are_lost_by_rounding_and_not_by_chance() -> None:
    """300 steps of −1e-4 from 1: an ulp below it is 2^-8, so the nearest value is always 1."""
    nearest = torch.ones(100_000, dtype=torch.bfloat16)
    by_chance, draw = nearest.clone(), generator(0, "test")
    for _ in range(300):
        nearest = (nearest.float() - 1e-4).to(torch.bfloat16)
        by_chance = rounded_by_chance(by_chance.float() - 1e-4, draw)
    assert float(nearest.float().mean()) == 1
    assert float(by_chance.float().mean()) == pytest.approx(0.97, abs=5e-4)


def test_rounding_by_chance_takes_one_of_the_two_neighbours_and_leaves_what_is_exact() -> None:
    values = torch.tensor([1.0, -1.5, 0.0, 3.0e38, 1.001, -1.001]).repeat(1000)
    rounded = rounded_by_chance(values, generator(0, "test")).float().reshape(1000, 6)
    assert [set(column.tolist()) for column in rounded.T[:3]] == [{1.0}, {-1.5}, {0.0}]
    assert set(rounded[:, 4].tolist()) == {1.0, 1.0078125}
    assert set(rounded[:, 5].tolist()) == {-1.0, -1.0078125}
    assert bool(torch.isfinite(rounded).all())


def test_its_update_is_adamw() -> None:
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(64, generator=draw)
    mine, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    ours = RoundedAdamW([{"params": [mine], "lr": 1e-2, "weight_decay": 0.1}], seed=0)
    torchs = torch.optim.AdamW([theirs], lr=1e-2, betas=BETAS, eps=EPS, weight_decay=0.1)
    for _ in range(5):
        mine.grad = torch.randn(64, generator=draw)
        theirs.grad = mine.grad.clone()
        ours.step()
        torchs.step()
    assert torch.allclose(mine, theirs, atol=1e-7)


def test_bf16_weights_are_held_in_bf16(toy: Taken) -> None:
    _, adapter = begun(toy, **BF16)
    assert {p.dtype for p in parameters(adapter).values()} == {torch.bfloat16}


# -- refusals ----------------------------------------------------------------------------------------------------------


def _advice(**changes: Any) -> list[Any]:
    table = TABLE.model_validate({"on": "base", "dataset": "drawings", **changes})
    return advise(table, {"on": [Artifact("checkpoint", "sd15")], "dataset": [None]})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train": ["unet.in12"]}, "the block pattern 'unet.in12' matches nothing"),
        ({"train": ["unet", "text_encoder"]}, "`train` names parts of the U-Net, and 'text_encoder' is none"),
        ({"train": ["unet.time"], "layers": "attention"}, "`train` names blocks without attention"),
        ({"weights": "bf16", "precision": "fp32"}, 'weights = "bf16" cannot be computed in precision = "fp32"'),
        ({"weights": "bf16", "optimizer": "schedule_free"}, 'weights = "bf16" is rounded by adamw, not by'),
        ({"weights": "bf16", "ema": 0.99}, 'an average of weights = "bf16" would stand still'),
    ],
)
def test_what_cannot_be_is_said_in_the_plan(changes: dict[str, Any], sentence: str) -> None:
    ((_, _, said, hint, warning),) = _advice(**changes)
    assert said.startswith(sentence)
    assert hint
    assert not warning


def test_what_can_be_is_not_talked_about() -> None:
    assert _advice() == _advice(**BF16) == _advice(train=["IN04", "unet.out0?"], layers="cross_attention") == []


def test_a_block_that_is_not_there_stops_where_no_plan_could_look(toy: Taken) -> None:
    with pytest.raises(UsageError, match=r"unet\.in12"):
        begun(toy, train=["unet.in12"])
