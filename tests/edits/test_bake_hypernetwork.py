"""Linear hypernetworks in a checkpoint: the same picture as at work, and a refusal for all others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdforge.artifact import Artifact
from sdforge.edits import bake
from sdforge.errors import UsageError
from sdforge.families.sd15.load import load
from sdforge.formats.hypernetwork import stated
from sdforge.formula import Plan
from sdforge.run.hypernetwork import attach
from tests.families.loras import CROSS as LAYER
from tests.families.loras import kept_lora, random_lora
from tests.families.workbench import SD15, Taken, keep, made, same_bytes
from tests.run.hypernetworks import CROSS, DEEP, LINEAR, SWISH, kept
from tests.trainings.test_training_contract import CAPTIONS, batch

Uses = list[tuple[Taken, dict[str, Any]]]


def planned(base: Taken, uses: Uses, dtype: str = "fp32", loras: tuple[Taken, ...] = ()) -> Plan:
    table = bake.Bake.model_validate(
        {
            "checkpoint": "base",
            "hypernetworks": {f"h{i}": use for i, (_, use) in enumerate(uses)},
            "loras": {f"l{i}": {} for i in range(len(loras))},
            "dtype": dtype,
        }
    )
    inputs = {
        "checkpoint": [base.input()],
        "hypernetworks": [taken.input(**use) for taken, use in uses],
        "loras": [lora.input() for lora in loras],
    }
    return bake.plan(table, inputs, SD15)


@torch.no_grad()
def said_baked(base: Taken, uses: Uses, work: Path) -> Tensor:
    """Return what a baked checkpoint predicts."""
    plan = planned(base, uses)
    parts = {c: base.tensors(c) for c in ("vae", "text_encoder")} | made(plan, base, *(taken for taken, _ in uses))
    baked = keep(work, parts, facts=base.artifact.facts, words=base.vocabulary)
    ours = load(baked.given(), torch.device("cpu"), torch.float32)
    one = batch()
    return ours.predict(one.noisy_BCHW, one.timesteps_B, ours.encode_text(CAPTIONS))


@torch.no_grad()
def said_attached(base: Taken, uses: Uses) -> Tensor:
    ours = load(base.given(), torch.device("cpu"), torch.float32)
    for taken, use in uses:
        attach(ours.unet, taken.tensors("hypernetwork"), taken.artifact.facts, use.get("strength", 1.0))
    one = batch()
    return ours.predict(one.noisy_BCHW, one.timesteps_B, ours.encode_text(CAPTIONS))


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("strength", [1.0, 0.7, -0.4])
@pytest.mark.parametrize(
    ("facts", "widths"), [(LINEAR, (8, 16)), (CROSS, (16,)), (stated(DEEP), (8,)), (stated([1.0, 1.0]), (16,))]
)
def test_a_baked_checkpoint_says_what_the_networks_at_work_say(
    facts: dict[str, Any], widths: tuple[int, ...], strength: float, toy: Taken, tmp_path: Path
) -> None:
    """Keys, values, the bias that softmax takes out and the one that it lets through."""
    uses: Uses = [(kept(tmp_path / "h", facts, widths=widths), {"strength": strength})]
    theirs = said_attached(toy, uses)
    assert apart(said_baked(toy, uses, tmp_path / "baked"), theirs) < 2e-6
    assert apart(said_attached(toy, []), theirs) > 1e-3


def test_several_follow_each_other_in_an_order_that_their_contents_decide(toy: Taken, tmp_path: Path) -> None:
    one, two = (kept(tmp_path / str(seed), LINEAR, seed=seed) for seed in (0, 1))
    uses: Uses = [(one, {"strength": 0.8}), (two, {"strength": -0.5})]
    there, back = planned(toy, uses), planned(toy, uses[::-1])
    assert there.identities() == back.identities()
    uses.sort(key=lambda use: use[0].identity("hypernetwork"))
    theirs = said_attached(toy, uses)
    assert apart(said_baked(toy, uses, tmp_path / "baked"), theirs) < 2e-6
    assert apart(said_attached(toy, uses[::-1]), theirs) > 1e-4


def test_only_keys_values_and_the_bias_behind_them_change(toy: Taken, tmp_path: Path) -> None:
    plan = planned(toy, [(kept(tmp_path / "h", CROSS, widths=(16,)), {})], dtype="")
    assert set(plan.components) == {"unet"}
    changed = {row.tensor.name for row in plan.components["unet"] if row.method}
    biases = {n.replace("to_v.weight", "to_out.0.bias") for n in SD15.cross_attention if n.endswith("to_v.weight")}
    assert changed == {*SD15.cross_attention} | biases
    result, before = made(plan, toy)["unet"] if not changed else {}, toy.tensors("unet")
    assert all(same_bytes(result[name], before[name]) for name in result)


def test_a_block_may_have_a_strength_of_its_own(toy: Taken, tmp_path: Path) -> None:
    one = kept(tmp_path / "h", CROSS, widths=(16,))
    plan = planned(toy, [(one, {"strength": 0.0, "blocks": {"unet.mid": 0.5}})], dtype="")
    changed = {row.tensor.name for row in plan.components["unet"] if row.method}
    assert len(changed) == 3
    assert all(name.startswith("mid_block.") for name in changed)
    assert planned(toy, [(one, {"strength": 0.0})], dtype="").components == {}


def test_a_matrix_is_the_formula_to_the_last_bit_of_16(toy: Taken, tmp_path: Path) -> None:
    one = kept(tmp_path / "h", CROSS, widths=(16,))
    result = made(planned(toy, [(one, {"strength": 0.7})], dtype=""), toy, one)["unet"]
    nets, before = one.tensors("hypernetwork"), toy.tensors("unet")
    for name in SD15.cross_attention:
        side, weight = name.removesuffix(".weight")[-1], before[name].double()
        first, second = (nets[f"16.{side}.linear.{i}.weight"].double() for i in range(2))
        assert torch.equal(result[name], (weight + 0.7 * weight @ (second @ first)).float().half())


def test_a_lora_on_the_same_layer_is_added(toy: Taken, tmp_path: Path) -> None:
    one, lora = kept(tmp_path / "h", CROSS, widths=(16,)), random_lora(toy, (LAYER,))
    kept_ = kept_lora(tmp_path / "lora", lora)
    name = f"{LAYER.removeprefix('unet.')}.weight"
    both = made(planned(toy, [(one, {})], loras=(kept_,)), toy, one, kept_)["unet"][name]
    alone = made(planned(toy, [(one, {})]), toy, one)["unet"][name]
    assert torch.allclose(both.double(), alone.double() + lora[LAYER].update, atol=1e-6)


def test_what_is_not_linear_is_refused_and_the_way_out_named(toy: Taken, tmp_path: Path) -> None:
    for facts, reason in (
        (SWISH, "swish"),
        (stated([1.0, 2.0, 1.0], layer_norm=True), "layer norms"),
        (stated(DEEP, activation="relu", layer_norm=True), "relu and layer norms"),
    ):
        with pytest.raises(UsageError, match=f"a hypernetwork with {reason} is no matrix") as caught:
            planned(toy, [(kept(tmp_path / reason, facts), {})])
        assert "[preset] sidecars" in caught.value.hint
        table = bake.Bake.model_validate({"checkpoint": "base", "hypernetworks": {"mood": {}}})
        told: list[Artifact | None] = [Artifact("hypernetwork", facts=facts)]
        ((role, _, sentence, hint, warning),) = bake.advise(table, {"checkpoint": [None], "hypernetworks": told})
        assert (role, warning) == ("hypernetworks.mood", False)
        assert sentence == f"`mood` has {reason}, and only linear hypernetworks become weights"
        assert hint == '[preset] sidecars = ["mood"]'
    linear: list[Artifact | None] = [Artifact("hypernetwork", facts=LINEAR)]
    assert bake.advise(table, {"checkpoint": [None], "hypernetworks": linear}) == []


def test_a_width_that_no_attention_has_is_refused(toy: Taken, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contexts 12 wide"):
        planned(toy, [(kept(tmp_path / "h", LINEAR, widths=(12, 16)), {})])
    with pytest.raises(UsageError, match="contexts 8 wide"):  # self-attention's, which are left alone
        planned(toy, [(kept(tmp_path / "h2", CROSS, widths=(8, 16)), {})])


def test_a_checkpoint_without_a_unet_is_refused(toy: Taken, tmp_path: Path) -> None:
    components = {name: each for name, each in toy.artifact.components.items() if name != "unet"}
    bare = replace(toy, artifact=replace(toy.artifact, components=components))
    with pytest.raises(UsageError, match="has no unet, which a hypernetwork changes"):
        planned(bare, [(kept(tmp_path / "h", LINEAR, widths=(16,)), {})])
