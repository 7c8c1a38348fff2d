"""Aesthetic gradients: a direction from pictures, and a text encoder that was steered towards it."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdforge.artifact import Artifact, Component
from sdforge.edits import bake
from sdforge.edits.export import run as export_run
from sdforge.errors import UsageError
from sdforge.families.sd15.load import load
from sdforge.formula import Plan
from sdforge.order import Given, Order, Outcome
from sdforge.run.diffusion import Diffusion
from sdforge.run.images import read_pixels
from sdforge.run.steering import Aesthetic, cosines
from sdforge.run.tensors import DTYPES
from sdforge.sidecars import aesthetic as sidecar
from sdforge.trainings.aesthetic_gradient import TABLE, adapter, advise, run
from tests.families.workbench import SD15, Taken, keep, made, same_bytes, take
from tests.run.order import order
from tests.trainings.clips import write_clip

CPU = torch.device("cpu")
RATE = 1e-3
TABLE_ROWS = "text_encoder.text_model.embeddings.token_embedding.weight"


@pytest.fixture(scope="module")
def clip(toys: Path) -> Taken:
    return take(write_clip(toys / "clip"))


def wanted(work: Path, toy: Taken, clip: Taken, pictures: Given, **changes: Any) -> Order:
    made_ = order(work, "aesthetic_gradient", toy, pictures, **{"steps": 5, "learning_rate": RATE} | changes)
    return dataclasses.replace(made_, inputs=made_.inputs | {"clip": [clip.given()]})


def steer(work: Path, toy: Taken, clip: Taken, pictures: Given, **changes: Any) -> tuple[Outcome, Taken]:
    order_ = wanted(work, toy, clip, pictures, **changes)
    outcome = run(order_, lambda **_: None, lambda: False)
    from safetensors.torch import load_file

    raw = load_file(work / outcome.pack)
    tensors = {name.removeprefix("aesthetic."): tensor for name, tensor in raw.items()}
    return outcome, keep(work / "kept", {"aesthetic": tensors}, kind="aesthetic", facts=outcome.facts)


@pytest.fixture(scope="module")
def steered(
    toy: Taken, clip: Taken, pictures: Given, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Outcome, Taken]:
    return steer(tmp_path_factory.mktemp("steered"), toy, clip, pictures)


def before(toy: Taken) -> dict[str, Tensor]:
    return {f"text_encoder.{name}": tensor.float() for name, tensor in toy.tensors("text_encoder").items()}


def test_the_cosine_rises_at_every_step(toy: Taken, clip: Taken, pictures: Given, tmp_path: Path) -> None:
    outcome, _ = steer(tmp_path, toy, clip, pictures, steps=12)
    losses = outcome.record["losses"]
    assert len(losses) == 13
    assert all(after < earlier for earlier, after in itertools.pairwise(losses))
    assert outcome.record["cosines"] == [pytest.approx(-losses[-1], abs=1e-3)]
    assert losses[0] - losses[-1] > 0.1


def test_without_a_step_it_is_the_text_encoder_as_it_was(
    toy: Taken, clip: Taken, pictures: Given, tmp_path: Path
) -> None:
    outcome, kept = steer(tmp_path, toy, clip, pictures, steps=0)
    tensors = kept.tensors("aesthetic")
    assert all(same_bytes(tensors[name], tensor) for name, tensor in before(toy).items())
    assert outcome.record["norm"] == 0
    assert outcome.facts["shift"] == 0


def test_a_weight_moves_by_about_the_rate_at_every_step(toy: Taken, steered: tuple[Outcome, Taken]) -> None:
    """Adam's first steps are signs: a sharp test of rate and steps."""
    after = steered[1].tensors("aesthetic")
    most = max(float((after[name] - tensor).abs().max()) for name, tensor in before(toy).items())
    assert most == pytest.approx(5 * RATE, rel=0.05)


def test_all_tensors_move_but_only_the_rows_of_the_prompt(toy: Taken, steered: tuple[Outcome, Taken]) -> None:
    after, old = steered[1].tensors("aesthetic"), before(toy)
    assert set(after) == {*old, "vector", "text_projection"}
    # a key's bias is the same for all places, which a softmax does not notice
    assert all(not torch.equal(after[n], t) for n, t in old.items() if not n.endswith("k_proj.bias"))
    moved = (after[TABLE_ROWS] != old[TABLE_ROWS]).any(1).nonzero().flatten().tolist()
    vocabulary = toy.vocabulary["vocab"]
    assert moved == sorted(vocabulary[w] for w in ("a</w>", "red</w>", "cat</w>", "<|startoftext|>", "<|endoftext|>"))


def test_the_direction_is_of_the_pictures_and_the_projection_the_clips(
    clip: Taken, steered: tuple[Outcome, Taken]
) -> None:
    tensors = steered[1].tensors("aesthetic")
    assert same_bytes(tensors["text_projection"], clip.tensors("text_projection")["weight"])
    assert tensors["vector"].shape == (12,)
    assert 0 < float(tensors["vector"].norm()) <= 1  # a mean of vectors of length 1


def test_it_is_read_where_the_prompt_ends_with_new_words_too(toy: Taken) -> None:
    """A new word has a larger number than the end, by which old CLIPs would mistake it for the end."""
    diffusion = load(toy.given(), CPU, torch.float32)
    diffusion.words.add("<toy>", 1)
    ids = torch.tensor([diffusion.words.encode("a <toy>")]).clamp_max(527)
    towards = Aesthetic(torch.randn(12), torch.randn(12, 16), 1, RATE)
    encoder: Any = diffusion.text_encoders["text_encoder"]
    with torch.no_grad():
        found = cosines(encoder, ids, diffusion.words.end, towards)
        (place,) = (ids[0] == diffusion.words.end).nonzero()[0].tolist()[:1]
        said = encoder(input_ids=ids).last_hidden_state[0, place] @ towards.projection_DW.T
    assert torch.allclose(found[0], torch.cosine_similarity(said, towards.vector_D, 0))


def baked(base: Taken, kept: Taken, strength: float, dtype: str = "") -> Plan:
    use = {"strength": strength}
    table = bake.Bake.model_validate({"checkpoint": "base", "aesthetics": {"mood": use}, "dtype": dtype})
    return bake.plan(table, {"checkpoint": [base.input()], "aesthetics": [kept.input(**use)]}, SD15)


def test_baked_at_1_it_is_the_steered_encoder_to_the_bit(toy: Taken, steered: tuple[Outcome, Taken]) -> None:
    _, kept = steered
    after = made(baked(toy, kept, 1.0, "fp32"), toy, kept)["text_encoder"]
    wanted_ = kept.tensors("aesthetic")
    assert all(same_bytes(tensor, wanted_[f"text_encoder.{name}"]) for name, tensor in after.items())
    rounded = made(baked(toy, kept, 1.0), toy, kept)["text_encoder"]
    assert all(same_bytes(t, wanted_[f"text_encoder.{n}"].to(DTYPES["F16"])) for n, t in rounded.items())
    assert baked(toy, kept, 0.0).components == {}


def test_half_of_it_is_halfway(toy: Taken, steered: tuple[Outcome, Taken]) -> None:
    _, kept = steered
    half, old = made(baked(toy, kept, 0.5, "fp32"), toy, kept)["text_encoder"], before(toy)
    steered_ = kept.tensors("aesthetic")
    for name, tensor in half.items():
        full = f"text_encoder.{name}"
        assert torch.allclose(tensor, (old[full] + steered_[full]) / 2, atol=1e-7)


def test_baked_for_its_prompt_it_says_what_steering_on_the_way_says(
    toy: Taken, steered: tuple[Outcome, Taken], tmp_path: Path
) -> None:
    outcome, kept = steered
    plan = baked(toy, kept, 1.0, "fp32")
    tensors = {c: toy.tensors(c) for c in toy.tables} | made(plan, toy, kept)
    result = keep(tmp_path, tensors, facts=toy.artifact.facts, words=toy.vocabulary)
    fixed, live = (load(taken.given(), CPU, torch.float32) for taken in (result, toy))
    sidecar.attach(live, kept.tensors("aesthetic"), outcome.facts)
    with torch.no_grad():
        assert torch.equal(fixed.encode_text(["a red cat"]).hidden_BLD, live.encode_text(["a red cat"]).hidden_BLD)
        assert not torch.equal(fixed.encode_text([""]).hidden_BLD, live.encode_text([""]).hidden_BLD)


def mean_cosine(encoder: Diffusion, kept: Taken, prompts: list[str]) -> float:
    towards = Aesthetic.of(kept.tensors("aesthetic"), {"steps": 1, "learning_rate": 1})
    with torch.no_grad():
        ids = encoder.token_ids(prompts, "text_encoder")
        return float(cosines(encoder.text_encoders["text_encoder"], ids, encoder.words.end, towards).mean())


def test_several_prompts_shift_prompts_that_were_not_among_them(
    toy: Taken, clip: Taken, pictures: Given, tmp_path: Path
) -> None:
    prompts = ["a red cat", "a house", "red drawing", "a cat", "the house is red", "a drawing of a cat"]
    outcome, kept = steer(tmp_path, toy, clip, pictures, prompts=prompts, steps=12)
    result = keep(
        tmp_path / "baked",
        {c: toy.tensors(c) for c in toy.tables} | made(baked(toy, kept, 1.0, "fp32"), toy, kept),
        facts=toy.artifact.facts,
        words=toy.vocabulary,
    )
    plain, fixed = (load(taken.given(), CPU, torch.float32) for taken in (toy, result))
    unseen = ["drawing of a house", "cat and house", "one red thing"]
    assert mean_cosine(fixed, kept, unseen) - mean_cosine(plain, kept, unseen) >= 0.1
    assert outcome.facts["shift"] > 0.05
    assert len(outcome.record["cosines"]) == 6


def test_rounding_the_result_keeps_the_cosine(toy: Taken, clip: Taken, pictures: Given, tmp_path: Path) -> None:
    _, exact = steer(tmp_path / "a", toy, clip, pictures)
    _, small = steer(tmp_path / "b", toy, clip, pictures, dtype="fp16")
    found = []
    for name, kept in (("c", exact), ("d", small)):
        tensors = {c: toy.tensors(c) for c in toy.tables} | made(baked(toy, kept, 1.0, "fp32"), toy, kept)
        result = keep(tmp_path / name, tensors, facts=toy.artifact.facts, words=toy.vocabulary)
        found.append(mean_cosine(load(result.given(), CPU, torch.float32), exact, ["a red cat"]))
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_a_file_of_it_is_read_as_it_was_written(toy: Taken, steered: tuple[Outcome, Taken], tmp_path: Path) -> None:
    _, kept = steered
    settings = {
        "title": "", "description": "", "licence": "", "trigger": [], "negative_prompt": "", "clip_skip": 0,
        "forms": ["aesthetics"],
    }  # fmt: skip
    inputs = {"checkpoint": [toy.given()], "aesthetics": [kept.given()]}
    export_run(Order("", "", "export", "edits", "sd15", settings, str(tmp_path), inputs), lambda **_: None)
    (file,) = (tmp_path / "aesthetics").glob("*.safetensors")
    again = take(file)
    assert (again.artifact.kind, again.artifact.facts) == ("aesthetic", kept.artifact.facts)
    assert again.identity("aesthetic") == kept.identity("aesthetic")


def test_another_vocabulary_is_refused(toy: Taken, steered: tuple[Outcome, Taken], tmp_path: Path) -> None:
    _, kept = steered
    tensors = kept.tensors("aesthetic")
    tensors[TABLE_ROWS] = torch.cat([tensors[TABLE_ROWS], tensors[TABLE_ROWS][:1]])
    with pytest.raises(UsageError, match=r"has text_encoder.*\[529, 16\]") as caught:
        baked(toy, keep(tmp_path, {"aesthetic": tensors}, kind="aesthetic"), 1.0)
    assert "after words were inserted" in caught.value.hint


def test_a_clip_with_more_layers_is_refused(toy: Taken, toys: Path, pictures: Given, tmp_path: Path) -> None:
    deeper = take(write_clip(toys / "deeper-clip", num_hidden_layers=3))
    with pytest.raises(UsageError, match="has 2 layers, the CLIP's text model 3"):
        steer(tmp_path, toy, deeper, pictures)


def test_a_clip_of_another_width_is_refused(toy: Taken, toys: Path, pictures: Given, tmp_path: Path) -> None:
    wider = take(write_clip(toys / "wider-clip", hidden_size=32))
    with pytest.raises(UsageError, match="is 16 wide, the CLIP's text model 32"):
        steer(tmp_path, toy, wider, pictures)


def test_a_picture_that_is_repeated_counts_as_often_and_is_looked_at_once(
    toys: Path, pictures: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, looked = take(write_clip(toys / "clip")).given(), []
    first, *others = pictures.pictures
    rows = [[*first[:3], 3], *others]
    monkeypatch.setattr(adapter, "read_pixels", lambda *a, **k: looked.append(a) or read_pixels(*a, **k))
    found_D = adapter.mean_embedding(clip, dataclasses.replace(pictures, pictures=rows), CPU)
    assert len(looked) == 3
    each = [adapter.mean_embedding(clip, dataclasses.replace(pictures, pictures=[row]), CPU) for row in rows]
    assert torch.allclose(found_D, (3 * each[0] + each[1] + each[2]) / 5, atol=1e-6)


def table(**more: Any) -> Any:
    return TABLE.model_validate({"on": "base", "dataset": "d", "clip": "c", "prompts": ["a"]} | more)


def test_the_plan_refuses_other_than_one_text_encoder() -> None:
    def on(*components: str) -> dict[str, list[Artifact | None]]:
        part = Component("x", "x", "", "")
        return {"on": [Artifact("checkpoint", "sdxl", dict.fromkeys(components, part))]}

    ((role, _, sentence, _, warning),) = advise(table(), on("unet", "text_encoder", "text_encoder_2"))
    assert (role, warning) == ("on", False)
    assert "2 text encoders" in sentence
    assert advise(table(), on("text_encoder")) == []


def test_the_plan_says_that_several_prompts_shift_all_of_them() -> None:
    ((_, code, sentence, _, warning),) = advise(table(prompts=["a", "b"]), {"on": [None]})
    assert (code, warning) == ("generic", True)
    assert "the empty one too" in sentence


def test_the_plan_of_a_bake_says_by_how_much_it_shifts() -> None:
    facts: dict[str, Any] = {"prompts": ["a", "b"], "shift": 0.123}
    wanted_ = bake.Bake.model_validate({"checkpoint": "base", "aesthetics": {"mood": {}}})
    ((role, _, sentence, hint, warning),) = bake.advise(wanted_, {"aesthetics": [Artifact("aesthetic", facts=facts)]})
    assert (role, warning) == ("aesthetics.mood", True)
    assert "2 prompts together" in sentence
    assert "12%" in sentence
    assert 'sidecars = ["mood"]' in hint
