"""DreamArtist: two sets of rows, and a prediction that is the guided one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdforge.families.sd15.load import load
from sdforge.families.sdxl.load import load as load_large
from sdforge.order import Given
from sdforge.run.adapter import Adapter
from sdforge.run.diffusion import Diffusion
from sdforge.run.images import Picture
from sdforge.trainings.dreamartist import TABLE, facts, opposite
from sdforge.trainings.dreamartist.adapter import begin
from tests.families.toys import write_family
from tests.families.workbench import Taken, digest, take
from tests.run.order import order, settings, train
from tests.trainings.test_training_contract import batch, parameters, said

SIZE = 528  # words of the toys' tokenizer


def begun(on: Taken, **changes: Any) -> tuple[Diffusion, Adapter]:
    diffusion = load(on.given(), torch.device("cpu"), torch.float32)
    return diffusion, begin(TABLE.model_construct(**settings("dreamartist", **changes)), diffusion)


def sets(adapter: Adapter) -> tuple[torch.Tensor, torch.Tensor]:
    found = parameters(adapter)
    return found["positive.text_encoder"].detach(), found["negative.text_encoder"].detach()


@pytest.mark.parametrize(("token", "other"), [("<ink>", "<ink-neg>"), ("ink", "ink-neg")])
def test_the_opposite_has_a_word_of_its_own(token: str, other: str) -> None:
    assert opposite(token) == other


def test_both_words_have_rows_behind_the_vocabulary(toy: Taken) -> None:
    diffusion, adapter = begun(toy, vectors=2, negative_vectors=3)
    positive, negative = sets(adapter)
    assert (positive.shape, negative.shape) == ((2, 16), (3, 16))
    assert diffusion.words.encode("a <toy>, <toy-neg>")[2:7] == [SIZE, SIZE + 1, 267, SIZE + 2, SIZE + 3]
    table = diffusion.token_tables()["text_encoder"]
    ids = torch.arange(SIZE - 1, SIZE + 5)[None]
    assert torch.equal(table(ids)[0], torch.cat([table.weight[-1:], positive, negative]))


@pytest.mark.parametrize("init", ["", "red"])
def test_the_two_sets_never_begin_alike(init: str, toy: Taken) -> None:
    """Of equal rows the guidance would have nothing to say, and their gradients would only scale each other."""
    diffusion, adapter = begun(toy, vectors=2, negative_vectors=2, init=init)
    positive, negative = sets(adapter)
    assert not torch.equal(positive, negative)
    if init:
        red = diffusion.token_tables()["text_encoder"].weight[toy.vocabulary["vocab"]["red</w>"]]
        assert torch.equal(positive, red.expand(2, -1))
        assert 0 < float((negative - red).abs().max()) < 1e-2


def test_what_is_compared_is_what_a_sampler_with_guidance_goes_by(toy: Taken) -> None:
    diffusion, adapter = begun(toy, guidance=4.0)
    one = batch(["a red <toy>, cat", "a <toy>"])
    with torch.no_grad():
        towards = diffusion.predict(one.noisy_BCHW, one.timesteps_B, diffusion.encode_text(one.captions))
        against = diffusion.encode_text(["a red <toy-neg>, cat", "a <toy-neg>"])
        away = diffusion.predict(one.noisy_BCHW, one.timesteps_B, against)
        assert torch.allclose(said(diffusion, adapter, one.captions), away + 4 * (towards - away), atol=1e-5)


def test_both_sides_are_told_the_sizes_of_the_pictures(toys: Path) -> None:
    """A family that is told sizes would else be guided by a difference of sizes too."""
    diffusion = load_large(take(write_family(toys / "sdxl", "sdxl")).given(), torch.device("cpu"), torch.float32)
    adapter = begin(TABLE.model_construct(**settings("dreamartist", guidance=4.0)), diffusion)
    framed = [Picture("", str(i), "", (128, 128), original=(640, 480)) for i in range(2)]
    one = replace(batch(["a red <toy>", "a <toy>"]), pictures=framed)
    with torch.no_grad():
        towards, away = (
            diffusion.predict(
                one.noisy_BCHW, one.timesteps_B, diffusion.sized(diffusion.encode_text(said), one.framings)
            )
            for said in (one.captions, ["a red <toy-neg>", "a <toy-neg>"])
        )
        condition = diffusion.sized(diffusion.encode_text(one.captions), one.framings)
        assert torch.allclose(adapter.predict(one, condition), away + 4 * (towards - away), atol=1e-5)


def test_one_pass_goes_through_the_network_for_both(toy: Taken) -> None:
    diffusion, adapter = begun(toy)
    seen: list[int] = []
    diffusion.unet.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    said(diffusion, adapter)
    assert seen == [4]
    said(diffusion, adapter, ["a house", ""])  # nothing to guide away from
    assert seen == [4, 2]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_both_sets_have_a_gradient_from_the_first_step(prediction: str, toy: Taken) -> None:
    stated = {"prediction": prediction} if prediction != "epsilon" else {}
    base = replace(toy, artifact=replace(toy.artifact, facts=toy.artifact.facts | stated))
    diffusion, adapter = begun(base, init="red")
    whole = digest(diffusion.token_tables()["text_encoder"].weight)
    (said(diffusion, adapter) - batch().target_BCHW).square().mean().backward()  # type: ignore[no-untyped-call]
    assert all(bool((p.grad != 0).any(1).all()) for p in parameters(adapter).values() if p.grad is not None)
    assert all(p.grad is not None for p in parameters(adapter).values())
    assert digest(diffusion.token_tables()["text_encoder"].weight) == whole


def test_the_opposite_has_a_learning_rate_of_its_own(toy: Taken) -> None:
    _, adapter = begun(toy, learning_rate=1e-2, negative_rate=0.25)
    assert [group.learning_rate for group in adapter.groups()] == [1e-2, 2.5e-3]


def test_no_row_grows_beyond_the_longest(toy: Taken) -> None:
    diffusion, adapter = begun(toy, vectors=2, negative_vectors=2, longest=1.5)
    median = float(diffusion.token_tables()["text_encoder"].weight.norm(dim=1).median())
    with torch.no_grad():
        for rows in parameters(adapter).values():
            rows[0].mul_(100)
            rows[1].mul_(0.1 * median / rows[1].norm())
    adapter.stepped(0)
    for rows in sets(adapter):
        assert rows.norm(dim=1).tolist() == pytest.approx([1.5 * median, 0.1 * median], rel=1e-4)


def test_words_and_guidance_are_facts_that_are_known_beforehand(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    outcome = train(order(tmp_path, "dreamartist", toy, pictures, steps=2, guidance=5.0))
    assert outcome.facts == {"token": "<toy>", "negative": "<toy-neg>", "guidance": 5.0}
    assert facts(TABLE.model_construct(**settings("dreamartist", guidance=5.0))) == outcome.facts
    shapes = {name: [tuple(row[2]) for row in rows] for name, rows in outcome.components.items()}
    assert shapes == {"embedding": [(3, 16)], "negative": [(6, 16)]}


def test_a_stopped_training_goes_on_with_both_sets(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    from sdforge.run.states import Stopped

    whole = train(order(tmp_path / "whole", "dreamartist", toy, pictures, steps=4))
    parts = order(tmp_path / "parts", "dreamartist", toy, pictures, steps=4)
    asks = iter(range(100))
    with pytest.raises(Stopped):
        train(parts, lambda: next(asks) == 2)
    assert train(parts).sha256 == whole.sha256
