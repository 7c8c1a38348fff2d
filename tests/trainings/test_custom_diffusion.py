"""Custom Diffusion: keys and values of the cross-attention, one word, varied views, the start of text left alone."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdforge.artifact import Artifact
from sdforge.errors import ActionFailed, UsageError
from sdforge.families import Family
from sdforge.families.sd15 import FAMILY
from sdforge.families.sd15.load import load
from sdforge.order import Given
from sdforge.run.adapter import Adapter, Batch
from sdforge.run.diffusion import Diffusion
from sdforge.run.images import Picture
from sdforge.run.states import Stopped
from sdforge.run.train import _mean_square, run_training
from sdforge.run.views import View
from sdforge.trainings import without
from sdforge.trainings.custom_diffusion import TABLE, WHOLE, advise, advise_words, chosen, facts
from sdforge.trainings.custom_diffusion.adapter import begin
from tests.families.workbench import Taken
from tests.run.order import order, settings, train
from tests.trainings.test_training_contract import batch, parameters, said

LAYERS = 16  # cross-attentions of Stable Diffusion 1.x


def begun(on: Taken, **changes: Any) -> tuple[Diffusion, Adapter]:
    diffusion = load(on.given(), torch.device("cpu"), torch.float32)
    return diffusion, begin(TABLE.model_construct(**settings("custom_diffusion", **changes)), diffusion)


def table(**changes: Any) -> Any:
    fixed = {"on": "base", "dataset": "drawings", "token": "<toy>"}
    return TABLE.model_validate(fixed | changes)


def test_keys_and_values_of_every_cross_attention_are_trained_and_the_word(toy: Taken) -> None:
    _, adapter = begun(toy)
    names = set(parameters(adapter)) - {"text_encoder"}
    assert names == set(FAMILY.cross_attention)
    assert len(names) == 2 * LAYERS
    assert all(name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight")) for name in names)


def test_the_whole_cross_attention_is_trained_where_it_is_asked_for(toy: Taken) -> None:
    _, adapter = begun(toy, freeze="attention")
    names = set(parameters(adapter)) - {"text_encoder"}
    assert len(names) == LAYERS * len(WHOLE)
    assert names >= set(FAMILY.cross_attention)
    assert all(".attn2." in name for name in names)


def test_what_is_saved_are_whole_matrices_and_as_many_rows_as_the_word_has(
    toy: Taken, pictures: Given, tmp_path: Path
) -> None:
    made = train(order(tmp_path, "custom_diffusion", toy, pictures, steps=2, vectors=2, dtype="fp32"))
    assert made.facts == {"token": "<toy>"}
    assert {row[0] for row in made.components["custom"]} == {f"unet.{name}" for name in FAMILY.cross_attention}
    assert [(row[0], row[2]) for row in made.components["embedding"]] == [("text_encoder", [2, 16])]


def test_no_gradient_comes_from_the_start_of_text(toy: Taken) -> None:
    diffusion, adapter = begun(toy)
    hidden = diffusion.encode_text(["a red <toy> cat"]).hidden_BLD
    for name in (name for name in FAMILY.cross_attention if name.startswith("mid")):
        layer, weight = diffusion.unet.get_submodule(name.removesuffix(".weight")), parameters(adapter)[name]
        plain = hidden @ weight.T
        first, second = layer(hidden), layer(hidden)
        assert torch.allclose(first, plain)
        only = torch.autograd.grad(first[:, 0].sum(), weight, allow_unused=True, materialize_grads=True)[0]
        assert float(only.abs().max()) == 0.0
        assert bool(torch.autograd.grad(second[:, 1:].sum(), weight)[0].any())


def test_rows_decay_never_and_have_a_rate_of_their_own(toy: Taken) -> None:
    _, adapter = begun(toy, learning_rate=1e-3, token_rate=4.0, weight_decay=0.1)
    matrices, rows = adapter.groups()
    assert (matrices.learning_rate, matrices.weight_decay) == (1e-3, 0.1)
    assert (rows.learning_rate, rows.weight_decay) == (4e-3, 0.0)
    assert set(rows.parameters) == {"text_encoder"}


def test_a_masked_loss_is_the_mean_over_what_counts() -> None:
    """diffusers divides by the places alone, of which there are a quarter as many: its loss is four times as large."""
    draw = torch.Generator().manual_seed(0)
    predicted, target = (torch.randn(2, 4, 8, 8, generator=draw) for _ in range(2))
    mask = (torch.rand(2, 1, 8, 8, generator=draw) > 0.5).float()
    one = Batch(predicted, target, torch.tensor([1, 2]), ["", ""], masks_B1HW=mask)
    square = (predicted - target) ** 2
    counted = [square[i][mask[i].expand(4, 8, 8) > 0].mean() for i in range(2)]
    assert torch.allclose(_mean_square(predicted, one), torch.stack(counted), atol=1e-6)
    theirs = (square * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
    assert torch.allclose(theirs, 4 * torch.stack(counted), atol=1e-5)


def test_a_view_that_shows_nothing_that_counts_teaches_nothing() -> None:
    ones = torch.ones(1, 4, 8, 8)
    one = Batch(ones, ones, torch.tensor([1]), [""], masks_B1HW=torch.zeros(1, 1, 8, 8))
    assert _mean_square(2 * ones, one).tolist() == [0.0]


def test_a_mask_that_leaves_nothing_is_refused_before_the_first_step(
    toy: Taken, pictures: Given, tmp_path: Path
) -> None:
    """Views read masks at every step, so the last picture's would be looked at last."""
    Image.new("L", (64, 64)).save(tmp_path / "mask.png")
    masks = ["", "", str(tmp_path / "mask.png")]
    rows = [[*row, mask] for row, mask in zip(pictures.pictures, masks, strict=True)]
    masked = dataclasses.replace(pictures, pictures=rows)
    steps: list[Any] = []
    with pytest.raises(ActionFailed, match="leaves nothing"):
        run_training(
            order(tmp_path, "custom_diffusion", toy, masked, batch=1, steps=6),
            lambda **said: steps.append(said.get("step")),
            lambda: False,
        )
    assert not any(steps)


def test_how_a_picture_is_shown_depends_on_seed_step_and_picture_alone(toy: Taken) -> None:
    one, other = (Picture("", sha, "a <toy>", (64, 64)) for sha in ("1", "2"))
    _, adapter = begun(toy)
    assert adapter.view(one, 5) == begun(toy)[1].view(one, 5)
    steps = [adapter.view(one, step) for step in range(12)]
    assert len(set(steps)) > 6
    assert steps != [adapter.view(other, step) for step in range(12)]
    assert not begun(toy, augment=False)[1].varies


def test_views_that_show_pictures_as_they_are_teach_what_no_views_do(
    toy: Taken, pictures: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, viewed = (
        order(tmp_path / str(augment), "custom_diffusion", toy, pictures, steps=4, flip=True, augment=augment)
        for augment in (False, True)
    )
    monkeypatch.setattr("sdforge.trainings.custom_diffusion.adapter.draw_view", lambda size, _: View(size, (0, 0)))
    assert train(viewed).record["losses"] == pytest.approx(train(plain).record["losses"], rel=1e-3)


@pytest.mark.parametrize("augment", [True, False])
def test_a_training_that_stops_and_goes_on_ends_with_the_same_bits(
    augment: bool, toy: Taken, pictures: Given, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"steps": 8, "flip": True, "caption_dropout": 0.2, "augment": augment}
    straight = train(order(tmp_path / "straight", "custom_diffusion", toy, pictures, **changes))
    broken = order(tmp_path / "broken", "custom_diffusion", toy, pictures, **changes)
    counted = itertools.count()
    with pytest.raises(Stopped):
        train(broken, lambda: next(counted) == 3)
    resumed = train(broken)
    assert resumed.sha256 == straight.sha256
    assert resumed.record["losses"] == straight.record["losses"]
    assert resumed.record["resumed"] == [{"step": 3}]


def test_prior_pictures_are_shown_as_they_are(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    wanted = order(tmp_path, "custom_diffusion", toy, pictures, steps=3, prior="class")
    wanted = dataclasses.replace(wanted, inputs=wanted.inputs | {"prior": [pictures]})
    made = train(wanted)
    assert len(made.record["losses"]) == 3
    assert made.record["derived"]["made"]["latents"] == 2 * len({row[1] for row in pictures.pictures})  # and mirrored


def test_bf16_and_a_budget_of_memory_train_too(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    wanted = order(tmp_path, "custom_diffusion", toy, pictures, steps=2, precision="bf16", how={"vram": 40_000_000})
    made = train(wanted)
    assert all(loss == loss for loss in made.record["losses"])
    assert "fits" in made.record


# -- refusals in the plan --------------------------------------------------------------------------------------------


def test_what_it_is_called_is_known_before_it_is_trained() -> None:
    assert facts(table(token="<mascot>")) == {"token": "<mascot>"}


def _said(on: Artifact | None, *captions: str) -> list[str]:
    dataset = Artifact("dataset", whole="x", notes={"rows": [[str(i), text, 1] for i, text in enumerate(captions)]})
    return [sentence for _, _, sentence, _, _ in advise(table(), {"on": [on], "dataset": [dataset]})]


def test_captions_have_to_name_the_word() -> None:
    assert "no caption of `drawings` names the token '<toy>'" in _said(None, "a cat")[0]
    assert "names the token '<toy>' but within other words" in _said(None, "a cat", "my<toy>box")[0]
    assert _said(Artifact("checkpoint", "sd15"), "a <toy> cat") == []


class Joint(type(FAMILY)):  # type: ignore[misc]
    """A family whose attention sees pictures and words together, as those after SDXL."""

    cross_attention = ()


def test_a_checkpoint_without_separate_keys_and_values_is_refused(toy: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    joint: Family = Joint()
    assert chosen(joint, "kv") == chosen(joint, "attention") == ()
    monkeypatch.setattr("sdforge.trainings.family", lambda _: joint)
    inputs: dict[str, list[Artifact | None]] = {"on": [Artifact("checkpoint", "sd15")]}
    for what in ("Custom Diffusion", "a hypernetwork"):
        ((role, _, sentence, _, warning),) = without("cross_attention", what, "base", inputs)
        assert (role, warning) == ("on", False)
        assert sentence.startswith(f"{what} cannot be trained on `base`")
        assert sentence.endswith("has no separate keys and values for what it is told")
    diffusion = load(toy.given(), torch.device("cpu"), torch.float32)
    with pytest.raises(UsageError, match="no keys and values"):
        begin(TABLE.model_construct(**settings("custom_diffusion")), dataclasses.replace(diffusion, family=joint))


def test_a_word_that_is_there_already_and_a_start_that_is_no_word_are_refused(toy: Taken) -> None:
    assert advise_words(table(init="cat red"), {}, toy.vocabulary) == []
    ((role, _, sentence, hint, _),) = advise_words(table(token="Cat", init="cat"), {}, toy.vocabulary)
    assert role == "token"
    assert "'Cat' is an ordinary word" in sentence
    assert hint == 'token = "<Cat>"'
    for init, name in (("ktn", "ktn"), ("cat zebra", "zebra"), ("", "")):
        ((_, _, sentence, _, _),) = advise_words(table(init=init), {}, toy.vocabulary)
        assert f"{name!r} is not one token" in sentence
    with pytest.raises(UsageError, match="more than one token"):
        begun(toy, init="zebra")


def test_the_word_says_nothing_where_a_caption_does_not_name_it(toy: Taken) -> None:
    _, adapter = begun(toy)
    rows = parameters(adapter)["text_encoder"]
    loss = said(adapter.diffusion, adapter, ["a cat", "a house"]).square().mean()
    assert not torch.autograd.grad(loss, rows, allow_unused=True, materialize_grads=True)[0].any()
    assert bool(torch.autograd.grad(said(adapter.diffusion, adapter).square().mean(), rows)[0].any())
    assert batch().captions[0] == "a red <toy> cat"
