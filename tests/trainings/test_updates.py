"""Trainings of updates beside layers: what is saved is the update that the network had, and the class can be kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdforge.artifact import Artifact
from sdforge.edits import bake
from sdforge.families.sd15.load import load
from sdforge.method import module_of
from sdforge.run.adapter import Adapter, Batch
from sdforge.run.diffusion import Conditioning, Diffusion
from sdforge.run.sketch import sketch
from sdforge.trainings import Updates, advise, advise_updates
from sdforge.trainings.lokr import split
from tests.families.workbench import SD15, Taken, keep, made
from tests.trainings.test_training_contract import batch, begun, parameters, said

CPU = torch.device("cpu")
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 2, "conv_rank": 2, "alpha": 1.0, "conv_alpha": 3.0}),
    "lora, divided by a root": ("lora", {"rank": 4, "alpha": 1.5, "rslora": True}),
    "dora": ("lora", {"rank": 2, "conv_rank": 2, "alpha": 1.0, "dora": True}),
    "loha": ("loha", {"rank": 2, "conv_rank": 3, "alpha": 1.0}),
    "lokr": ("lokr", {"rank": 1, "conv_rank": 1, "alpha": 2.0, "factor": 4}),
    "lokr, both factors whole": ("lokr", {"rank": 2, "conv_rank": 2, "alpha": 3.0, "factor": 4, "whole": True}),
}
EACH = pytest.mark.parametrize("name", KINDS)


def started(name: str, on: Taken, **more: Any) -> tuple[Diffusion, Adapter]:
    training, settings = KINDS[name]
    return begun(training, on, **settings, **more)


def shaken(adapter: Adapter) -> None:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters(adapter).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))


def kept(adapter: Adapter, work: Path) -> Taken:
    learned = adapter.learned()
    tensors = {name: tensor.detach() for name, tensor in learned.components["lora"].items()}
    return keep(work, {"lora": tensors}, kind="lora", facts=learned.facts)


def baked(toy: Taken, lora: Taken, work: Path) -> Diffusion:
    table = bake.Bake.model_validate({"checkpoint": "b", "loras": {"l": {}}, "dtype": "fp32"})
    plan = bake.plan(table, {"checkpoint": [toy.input()], "loras": [lora.input()]}, SD15)
    parts = {"vae": toy.tensors("vae"), **made(plan, toy, lora)}
    return load(keep(work, parts, facts=toy.artifact.facts, words=toy.vocabulary).given(), CPU, torch.float32)


def spoken(diffusion: Diffusion, one: Batch) -> Tensor:
    return diffusion.predict(one.noisy_BCHW, one.timesteps_B, diffusion.encode_text(one.captions))


@EACH
def test_it_begins_as_the_checkpoint_to_the_bit_and_is_it_again_when_switched_off(name: str, toy: Taken) -> None:
    adapter: Any
    diffusion, adapter = started(name, toy, text_encoder=True)
    trained = {n for n, p in parameters(adapter).items() if p.requires_grad}
    with torch.no_grad():
        base = spoken(load(toy.given(), CPU, torch.float32), batch())
        assert torch.equal(said(diffusion, adapter), base)
        shaken(adapter)
        adapter.switch(on=False)
        assert torch.equal(said(diffusion, adapter), base)
        adapter.switch(on=True)
        assert not torch.equal(said(diffusion, adapter), base)
    assert {n for n, p in parameters(adapter).items() if p.requires_grad} == trained != set()


@EACH
def test_what_is_saved_is_the_update_that_the_network_had(name: str, toy: Taken, tmp_path: Path) -> None:
    diffusion, adapter = started(name, toy)
    shaken(adapter)
    before = toy.tensors("unet")
    ours = baked(toy, kept(adapter, tmp_path / "a"), tmp_path / "b")
    with torch.no_grad():
        theirs, mine = said(diffusion, adapter), spoken(ours, batch())
    assert float((mine - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())
    norm = math.sqrt(sum(float((t - before[n]).double().square().sum()) for n, t in ours.unet.state_dict().items()))
    assert sketch(adapter.learned().update)[1] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [(320, -1, 16), (320, 8, 8), (320, 7, 5), (640, -1, 20), (768, 0, 24), (7, 4, 1), (8, 64, 2), (12, 6, 2)],
)
def test_a_dimension_is_split_as_lycoris_splits_it(size: int, factor: int, expected: int) -> None:
    """A factor that divides counts as it is, otherwise the largest divisor up to it and to the root."""
    assert split(size, factor) == expected


def test_a_kronecker_product_is_small_where_its_rank_says_so(toy: Taken) -> None:
    _, adapter = begun("lokr", toy, rank=1, factor=4)
    flat = "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"  # (64, 8)
    tensors = {n: tuple(t.shape) for n, t in adapter.learned().components["lora"].items() if n.startswith(flat)}
    assert tensors == {f"{flat}.lokr_w1": (4, 2), f"{flat}.lokr_w2_a": (16, 1), f"{flat}.lokr_w2_b": (1, 4)}
    _, adapter = begun("lokr", toy, rank=8, factor=4)
    tensors = {n: tuple(t.shape) for n, t in adapter.learned().components["lora"].items() if n.startswith(flat)}
    assert tensors == {f"{flat}.lokr_w1": (4, 2), f"{flat}.lokr_w2": (16, 4)}
    assert adapter.learned().facts == {}


# -- preserving --------------------------------------------------------------------------------------------------------


def speaking(diffusion: Diffusion) -> Diffusion:
    """Let captions say much: the toy's own text encoder is random, and all captions are nearly one to it."""

    def encode(prompts: list[str]) -> Conditioning:
        draws = [torch.Generator().manual_seed(sum(map(ord, prompt))) for prompt in prompts]
        return Conditioning(torch.cat([3 * torch.randn(1, 1, 16, generator=d).expand(1, 77, 16) for d in draws]))

    diffusion.encode_text = encode  # type: ignore[method-assign, assignment]
    return diffusion


def moved(toy: Taken, **settings: Any) -> tuple[float, float]:
    """Train `a red` to something else; return how far the class `a cat` and the instance are from the checkpoint."""
    diffusion, adapter = begun("lora", toy, rank=4, **settings)
    speaking(diffusion)
    base = speaking(load(toy.given(), CPU, torch.float32))
    instance, other = batch(["a red"] * 2), batch(["a cat"] * 2)
    with torch.no_grad():
        target = spoken(base, instance) + torch.randn(1, 4, 1, 1, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.Adam(parameters(adapter).values(), lr=1e-2)
    for _ in range(8):
        loss = (spoken(diffusion, instance) - target).square().mean()
        more = adapter.also(instance)
        optimizer.zero_grad()
        (loss if more is None else loss + more).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        found = [float((spoken(diffusion, b) - spoken(base, b)).square().mean()) for b in (other, instance)]
    return found[0], found[1]


def test_preserving_a_class_keeps_most_of_it_without_pictures_of_it(toy: Taken) -> None:
    """At least half of the class's drift is gone (measured here: 91 %), and the instance is learned all the same."""
    plain, preserved = moved(toy), moved(toy, preserve="cat", trigger="red")
    assert preserved[0] < 0.5 * plain[0]
    assert preserved[1] > 0.8 * plain[1]


def test_captions_without_the_trigger_are_not_asked_for(toy: Taken) -> None:
    _, adapter = begun("loha", toy, preserve="cat", trigger="red")
    assert adapter.also(batch(["a house", ""])) is None
    shaken(adapter)
    whole, half = adapter.also(batch(["a red", "a red"])), adapter.also(batch(["a red", ""]))
    assert whole is not None
    assert half is not None
    assert 0 < float(half) < float(whole)
    assert begun("loha", toy)[1].also(batch()) is None


def test_what_shuffled_captions_say_of_the_class_is_not_kept_for_ever(toy: Taken) -> None:
    for shuffle, kept in ((False, 1), (True, 0)):
        _, adapter = begun("loha", toy, preserve="cat", trigger="red", shuffle=shuffle)
        assert adapter.also(batch(["a red", "a red"])) is not None
        assert len(vars(adapter)["_classes"]) == kept


def test_preserving_asks_nothing_where_nothing_has_been_learned(toy: Taken) -> None:
    _, adapter = begun("lokr", toy, preserve="cat", trigger="red")
    found = adapter.also(batch(["a red", "a red"]))
    assert found is not None
    assert float(found) == 0


def advice(**settings: Any) -> list[Any]:
    table: type[Updates] = module_of("trainings", "lora").TABLE
    dataset = Artifact("dataset", whole="x", notes={"rows": [["0", "a <toy>", 1]]})
    given = table.model_validate({"on": "base", "dataset": "drawings", **settings})
    return advise_updates(given, {"on": [None], "dataset": [dataset]})


def test_what_preserving_needs_is_asked_before_hours_are_spent() -> None:
    assert advice() == advice(preserve="toy", trigger="<toy>") == []
    ((role, code, sentence, _, warning),) = advice(preserve="toy")
    assert (role, code, warning) == ("dataset", "preserve", False)
    assert "needs a trigger" in sentence
    ((_, _, sentence, _, _),) = advice(preserve="toy", trigger="<other>")
    assert "no caption of `drawings` names the trigger '<other>'" in sentence


@pytest.mark.parametrize(
    ("stated", "idle"),
    [
        ({"text_learning_rate": 1e-4, "text_encoder": True, "conv_alpha": 4.0, "conv_rank": 2}, []),
        ({"text_learning_rate": 1e-4, "conv_alpha": 4.0}, ["text_learning_rate", "conv_alpha"]),
        ({"keep_tokens": 1, "prior_weight": 0.5}, ["keep_tokens", "prior_weight"]),
        ({"keep_tokens": 0, "prior_weight": 1.0}, []),  # as they are by default
        ({"trigger": "red", "preserve_weight": 2.0}, ["preserve_weight", "trigger"]),
    ],
)
def test_settings_that_decide_nothing_are_remarked(stated: dict[str, Any], idle: list[str]) -> None:
    table = module_of("trainings", "lora").TABLE.model_validate({"on": "base", "dataset": "drawings", **stated})
    said = [row for row in advise(table, {"on": [None]}) if row[1] == "idle"]
    assert [row[0] for row in said] == idle
    assert all(row[4] for row in said)
