"""Merges of whole checkpoints: which weight a tensor gets, what passes through, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdforge.errors import ActionFailed, SettingErrors, UsageError
from sdforge.families import family
from sdforge.formula import Input, Plan
from sdforge.method import block_parameters, method, resolve_blocks
from sdforge.order import Order
from sdforge.run.formula import run_formula
from tests.families.workbench import SD15, Taken, computations, keep, made, same_bytes
from tests.planner.conftest import World

BLOCK = {(n.component, n.canonical): n.block for n in SD15.names()}


def planned(name: str, taken: list[Taken], **settings: Any) -> Plan:
    """Plan a merge; the checkpoints go into its roles in their order."""
    found = method(name)
    names: dict[str, Any] = {}
    inputs: dict[str, list[Input]] = {}
    rest = list(taken)
    for role, spec in found.signature.roles.items():
        these = rest if spec.many else [rest.pop(0)]
        inputs[role] = [each.input() for each in these]
        names[role] = [f"n{i}" for i in range(len(these))] if spec.many else role
    return found.plan(found.table.model_validate({**names, **settings}), inputs, SD15)


def summed(toy: Taken, other: Taken, **settings: Any) -> Plan:
    return planned("weighted_sum", [toy, other], **settings)


def share(plan: Plan, component: str, name: str) -> float:
    """The second checkpoint's weight in a tensor that is computed."""
    (row,) = (row for row in plan.components[component] if row.tensor.name == name)
    return float(row.parameters["weights"][1])


def test_the_vae_stays_the_first_checkpoints(toy: Taken, other: Taken) -> None:
    assert set(summed(toy, other, weights=[0.5, 0.5]).components) == {"unet", "text_encoder"}


def test_a_vae_that_a_block_names_is_merged(toy: Taken, other: Taken) -> None:
    plan = summed(toy, other, weights=[1.0, 0.0], blocks={"vae": [0.5, 0.5]})
    assert all(row.method == "weighted_sum" for row in plan.components["vae"])
    assert all(not row.method for row in plan.components["unet"])


def test_a_block_pattern_decides_in_its_blocks_alone(toy: Taken, other: Taken) -> None:
    plan = summed(toy, other, weights=[0.5, 0.5], blocks={"unet.mid": [0.25, 0.75], "text_encoder": [0.9, 0.1]})
    for row in plan.components["unet"]:
        expected = 0.75 if BLOCK["unet", row.tensor.name] == "mid" else 0.5
        assert share(plan, "unet", row.tensor.name) == expected
    assert {row.parameters["weights"][1] for row in plan.components["text_encoder"]} == {0.1}


def test_a_part_of_tensors_names_decides_in_those_alone(toy: Taken, other: Taken) -> None:
    """The elemental merge of SuperMerger: `M00:attn1:0.75` over a block's own weight."""
    blocks = {"M00": [0.9, 0.1], "M00:attn1": [0.25, 0.75], "text_encoder:mlp": [0.6, 0.4]}
    plan = summed(toy, other, weights=[0.5, 0.5], blocks=blocks)
    for row in plan.components["unet"]:
        inside, name = BLOCK["unet", row.tensor.name] == "mid", row.tensor.name
        assert share(plan, "unet", name) == (0.75 if inside and "attn1" in name else 0.1 if inside else 0.5)
    for row in plan.components["text_encoder"]:
        assert share(plan, "text_encoder", row.tensor.name) == (0.4 if "mlp" in row.tensor.name else 0.5)


def test_the_most_exact_pattern_wins(toy: Taken, other: Taken) -> None:
    blocks = {"unet": [0.9, 0.1], "unet.in*": [0.8, 0.2], "unet.in0*": [0.7, 0.3], "unet.in04": [0.6, 0.4]}
    plan = summed(toy, other, weights=[0.5, 0.5], blocks=blocks)
    assert share(plan, "unet", "conv_in.weight") == 0.3
    assert share(plan, "unet", "down_blocks.1.resnets.0.conv1.weight") == 0.4
    assert share(plan, "unet", "down_blocks.3.resnets.0.conv1.weight") == 0.2
    assert share(plan, "unet", "conv_out.weight") == 0.1


def test_blocks_may_be_spelled_as_the_merge_programs_do(toy: Taken, other: Taken) -> None:
    theirs = {"IN04": [0.6, 0.4], "M00": [0.7, 0.3], "OUT11": [0.8, 0.2]}
    ours = {"unet.in04": [0.6, 0.4], "unet.mid": [0.7, 0.3], "unet.out11": [0.8, 0.2]}
    plans = [summed(toy, other, weights=[0.5, 0.5], blocks=blocks).identities() for blocks in (theirs, ours)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ({"unet.middle": [0.5, 0.5]}, "matches nothing"),
        ({"unet.in?4": [0.5, 0.5], "unet.in?[0-5]": [0.4, 0.6]}, "both match unet.in04"),
        ({"unet.in12": [0.5, 0.5]}, "matches nothing"),
    ],
)
def test_patterns_that_say_nothing_or_two_things_are_refused(
    blocks: dict[str, list[float]], words: str, toy: Taken, other: Taken
) -> None:
    with pytest.raises(UsageError, match=words.replace(".", r"\.")):
        summed(toy, other, weights=[0.5, 0.5], blocks=blocks)


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [("IN4", "unet.in04"), ("mid", "unet.mid"), ("unet.middle", "unet.mid"), ("BASE", "text_encoder*"), ("VAE", "vae")],
)
def test_a_pattern_that_matches_nothing_is_told_what_was_meant(pattern: str, meant: str) -> None:
    with pytest.raises(SettingErrors) as caught:
        resolve_blocks({pattern: 1.0}, SD15)
    ((_, _, hint),) = caught.value.found
    assert hint == f"did you mean {meant!r}?"


@pytest.mark.parametrize(
    ("elsewhere", "here"),
    [
        ("triple_sum", "weighted_sum"),
        ("n_average", "linear"),
        ("dare_ties", "dare"),
        ("breadcrumbs_ties", "breadcrumbs"),
        ("add_difference_ties", "ties"),
        ("passthrough", "scale"),
        ("add_cosine_b", "cosine"),
        ("weights_clip", "clamp"),
    ],
)
def test_what_other_programs_call_a_merge_is_known(elsewhere: str, here: str) -> None:
    with pytest.raises(UsageError) as caught:
        method(elsewhere)
    assert caught.value.hint == f"did you mean {here!r}?"


def test_every_tensor_of_the_family_is_in_a_block_that_a_pattern_can_name() -> None:
    assert all(n.block for n in SD15.names() if n.component == "unet")
    assert {n.block for n in SD15.names() if n.component == "unet"} == {
        "time",
        "mid",
        "out",
        *(f"in{i:02}" for i in range(12)),
        *(f"out{i:02}" for i in range(12)),
    }


@pytest.mark.parametrize(("weights", "kept"), [([1.0, 0.0], 0), ([0.0, 1.0], 1)])
def test_weight_one_passes_a_checkpoint_through(weights: list[float], kept: int, toy: Taken, other: Taken) -> None:
    plan, source = summed(toy, other, weights=weights), (toy, other)[kept]
    assert plan.identities() == {name: source.identity(name) for name in ("unet", "text_encoder")}
    assert plan.size() == 0
    result = made(plan, toy, other)
    assert all(same_bytes(result["unet"][name], t) for name, t in source.tensors("unet").items())


@pytest.mark.parametrize("name", ["weighted_sum", "slerp", "add_difference"])
def test_a_checkpoint_merged_with_itself_keeps_its_name(name: str, toy: Taken) -> None:
    count = 3 if name == "add_difference" else 2
    settings = {"weights": [0.3, 0.7]} if name == "weighted_sum" else {}
    plan = planned(name, [toy] * count, **settings)
    assert plan.identities() == {part: toy.identity(part) for part in ("unet", "text_encoder")}
    assert not any(row.method for rows in plan.components.values() for row in rows)


def test_an_edit_of_one_block_renames_that_block_alone(toy: Taken, other: Taken) -> None:
    before = summed(toy, other, weights=[0.5, 0.5])
    after = summed(toy, other, weights=[0.5, 0.5], blocks={"unet.mid": [0.4, 0.6]})
    assert before.identities()["text_encoder"] == after.identities()["text_encoder"]
    pairs = zip(before.components["unet"], after.components["unet"], strict=True)
    changed = {BLOCK["unet", a.tensor.name] for a, b in pairs if a.tensor.identity != b.tensor.identity}
    assert changed == {"mid"}


def test_a_merge_of_toys_is_what_the_formula_says(toy: Taken, other: Taken) -> None:
    result = made(summed(toy, other, weights=[0.75, 0.25]), toy, other)
    a, b = toy.tensors("unet"), other.tensors("unet")
    assert set(result["unet"]) == set(a)
    for name, tensor in result["unet"].items():
        exact = 0.75 * a[name].double() + 0.25 * b[name].double()
        assert tensor.dtype == torch.float16
        assert torch.allclose(tensor.double(), exact, rtol=2**-10, atol=2**-14)


@pytest.mark.parametrize(("dtype", "stored"), [("fp32", "F32"), ("bf16", "BF16"), ("fp16", "F16"), ("", "F16")])
def test_the_result_has_the_declared_type(dtype: str, stored: str, toy: Taken, other: Taken) -> None:
    plan = summed(toy, other, weights=[0.5, 0.5], dtype=dtype)
    assert plan.dtypes() == {"unet": stored, "text_encoder": stored}
    rows = [c for c in computations(plan, toy, other) if c.name == "conv_in.weight"]
    assert [c.dtype for c in rows] == [stored]


def test_what_passes_through_is_cast_to_the_declared_type(toy: Taken, other: Taken) -> None:
    plan = summed(toy, other, weights=[1.0, 0.0], dtype="fp32")
    assert {row.method for row in plan.components["unet"]} == {"cast"}
    name = "conv_in.weight"
    assert torch.equal(made(plan, toy, other)["unet"][name], toy.tensors("unet")[name].float())


def test_the_order_in_which_tensors_are_computed_changes_no_byte(toy: Taken, other: Taken, tmp_path: Path) -> None:
    rows = computations(summed(toy, other, weights=[0.7, 0.3]), toy, other)
    outcomes = []
    for name, ordered in (("there", rows), ("back", rows[::-1])):
        (tmp_path / name).mkdir()
        order = Order("", "", "weighted_sum", "merges", "sd15", {}, str(tmp_path / name), compute=ordered)
        outcomes.append(run_formula(order, lambda **_: None))
    assert outcomes[0].sha256 == outcomes[1].sha256
    assert outcomes[0].grade == "A"


def test_shards_and_their_order_change_no_name(toy: Taken, tmp_path: Path) -> None:
    halves = list(toy.tensors("unet").items())
    parts = [dict(halves[::2]), dict(halves[1::2])]
    kept = [keep(tmp_path / str(i), {"unet": part}) for i, part in enumerate(parts)]
    identities = {t.name: t.identity for each in kept for t in each.tables["unet"]}
    assert identities == {t.name: t.identity for t in toy.tables["unet"]}


def _pair(tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> list[Taken]:
    return [keep(tmp_path / name, {"unet": table}) for name, table in (("a", first), ("b", second))]


def test_integers_are_never_merged(tmp_path: Path) -> None:
    first, second = torch.arange(8), torch.arange(8) + 5
    taken = _pair(tmp_path, {"conv_in.weight": first}, {"conv_in.weight": second})
    plan = planned("weighted_sum", taken, weights=[0.1, 0.9], dtype="fp16")
    assert torch.equal(made(plan, *taken)["unet"]["conv_in.weight"], first)


def test_a_tensor_that_one_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    x = torch.ones(2, 2)
    taken = _pair(tmp_path, {"conv_in.weight": x, "conv_in.bias": x}, {"conv_in.weight": x})
    with pytest.raises(UsageError, match=r"needs unet\.conv_in\.bias, which checkpoint 2 does not have"):
        planned("weighted_sum", taken, weights=[0.5, 0.5])


def test_a_tensor_that_only_a_later_checkpoint_has_is_named(tmp_path: Path) -> None:
    x = torch.ones(2, 2)
    taken = _pair(tmp_path, {"conv_in.weight": x}, {"conv_in.weight": x, "conv_in.bias": x})
    with pytest.raises(UsageError, match=r"no place for unet\.conv_in\.bias of checkpoint 2"):
        planned("weighted_sum", taken, weights=[0.5, 0.5])


def test_tensors_of_two_shapes_are_named(tmp_path: Path) -> None:
    taken = _pair(tmp_path, {"conv_in.weight": torch.ones(2, 4)}, {"conv_in.weight": torch.ones(2, 9)})
    with pytest.raises(UsageError, match=r"conv_in\.weight of shapes \[2, 4\] and \[2, 9\]"):
        planned("weighted_sum", taken, weights=[0.5, 0.5])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nan_and_inf_stop_with_the_tensors_name(bad: float, dtype: torch.dtype, tmp_path: Path) -> None:
    sick = torch.tensor([1, bad], dtype=dtype)
    taken = _pair(tmp_path, {"conv_in.bias": torch.ones(2, dtype=dtype)}, {"conv_in.bias": sick})
    with pytest.raises(ActionFailed, match=r"unet\.conv_in\.bias: an input \(.*\) holds NaN or Inf") as caught:
        made(planned("weighted_sum", taken, weights=[0.5, 0.5]), *taken)
    assert caught.value.exit_code == 1


def test_overflow_stops_with_the_tensors_name_and_a_way_out(tmp_path: Path) -> None:
    big = {"conv_in.bias": torch.tensor([60000.0]).half()}
    taken = _pair(tmp_path, big, {"conv_in.bias": torch.tensor([50000.0]).half()})
    with pytest.raises(ActionFailed, match=r"unet\.conv_in\.bias holds 109984") as caught:
        made(planned("weighted_sum", taken, weights=[1.0, 1.0]), *taken)
    assert "bf16" in caught.value.hint
    wider = made(planned("weighted_sum", taken, weights=[1.0, 1.0], dtype="fp32"), *taken)
    assert wider["unet"]["conv_in.bias"].tolist() == [109984.0]  # fp16 has no 50000


def test_what_comes_out_subnormal_is_kept(tmp_path: Path) -> None:
    tiny = torch.tensor([2.0**-24]).half()
    taken = _pair(tmp_path, {"conv_in.bias": tiny}, {"conv_in.bias": tiny * 3})
    result = made(planned("weighted_sum", taken, weights=[0.5, 0.5]), *taken)
    assert result["unet"]["conv_in.bias"].tolist() == [2.0**-23]


def test_equal_bytes_are_equal_inputs(tmp_path: Path) -> None:
    minus_zero = torch.tensor([-0.0, 1.0])
    taken = _pair(tmp_path, {"conv_in.bias": minus_zero}, {"conv_in.bias": minus_zero.clone()})
    result = made(planned("weighted_sum", taken, weights=[0.7, 0.3]), *taken)
    assert same_bytes(result["unet"]["conv_in.bias"], minus_zero)


@pytest.mark.parametrize("weights", [[0.5], [0.2, 0.3, 0.5]])
def test_there_is_one_weight_for_each_checkpoint(weights: list[float], toy: Taken, other: Taken) -> None:
    with pytest.raises((UsageError, ValueError)):
        summed(toy, other, weights=weights)


# -- what merges ask of the engine -------------------------------------------------------------------------------------


def test_a_mask_is_drawn_by_the_tensors_name_and_no_other_merge_knows_it(toy: Taken, other: Taken) -> None:
    dare, ties = (planned(name, [toy, other]) for name in ("dare", "ties"))
    assert {row.parameters["tensor"] for row in dare.components["unet"] if row.method} == {
        f"unet.{row.tensor.name}" for row in dare.components["unet"] if row.method
    }
    assert not any("tensor" in row.parameters or "seed" in row.parameters for row in ties.components["unet"])


def test_the_seed_concerns_what_is_drawn_alone(toy: Taken, other: Taken) -> None:
    plans = [planned("dare", [toy, other], seed=seed, density=0.5, blocks={"text_encoder": [0]}) for seed in (1, 2)]
    one, two = (plan.identities() for plan in plans)
    assert one["unet"] != two["unet"]
    assert one["text_encoder"] == two["text_encoder"] == toy.identity("text_encoder")
    whole = [planned("dare", [toy, other], seed=seed, density=1.0).identities() for seed in (1, 2)]
    assert whole[0] == whole[1]


def test_what_adjusts_six_tensors_lets_the_others_through(toy: Taken) -> None:
    plan = planned("adjust", [toy], detail_in=1.0, detail_out=1.0, detail_out2=1.0, contrast=1.0)
    changed = {row.tensor.name for row in plan.components["unet"] if row.method}
    assert changed == {
        f"{layer}.{part}" for layer in ("conv_in", "conv_norm_out", "conv_out") for part in ("weight", "bias")
    }
    assert plan.identities()["text_encoder"] == toy.identity("text_encoder")
    before, after = toy.tensors("unet"), made(plan, toy)["unet"]
    assert torch.allclose(after["conv_out.bias"][0].float(), before["conv_out.bias"][0].float() + 0.02, atol=1e-3)


def test_colors_are_those_of_the_familys_latents(toy: Taken) -> None:
    table = method("adjust").table.model_validate({"a": "x", "brightness": 1.0})
    asked = ("tensor", "latents")
    told = [block_parameters(table, family(name), asked)("unet", "out", "conv_out.bias") for name in ("sd15", "sdxl")]
    assert [each and each["latents"] for each in told] == ["sd", "sdxl"]
    (row,) = (row for row in planned("adjust", [toy], brightness=1.0).components["unet"] if row.method)
    assert row.parameters == {"brightness": 1.0, "latents": "sd", "tensor": "unet.conv_out.bias"}


@pytest.mark.parametrize("name", ["adjust", "dare", "della"])
def test_a_merge_is_told_what_it_asks_for_and_nothing_else(name: str, toy: Taken, other: Taken) -> None:
    settings = {"detail_in": 1.0} if name == "adjust" else {}
    rows = planned(name, [toy] if name == "adjust" else [toy, other], **settings).components["unet"]
    found = {key for row in rows if row.method for key in row.parameters} & {"seed", "tensor"}
    assert found == ({"tensor"} if name == "adjust" else {"seed", "tensor"})


def test_the_recipes_seed_reaches_a_merge(world: World) -> None:
    text = '[dare.x]\nbase = "flat"\ncheckpoints = ["ink"]\n'
    identities = []
    for head in ("", "seed = 5\n", "seed = 6\n"):
        world.recipe(head + text + ("seed = 5\n" if head.endswith("6\n") else ""))
        step = world.plan().steps["r:x"]
        assert step.artifact is not None
        identities.append((step.key, step.artifact.components["unet"].identity))
    assert identities[0] != identities[1] == identities[2]


def test_masks_of_one_tensor_do_not_depend_on_what_else_is_merged(toy: Taken, other: Taken) -> None:
    whole, base = made(planned("dare", [toy, other], density=0.5), toy, other)["unet"], toy.tensors("unet")
    part = planned("dare", [toy, other], density=0.5, blocks={"unet": [0], "M00": [1]})
    for name, tensor in made(part, toy, other)["unet"].items():
        expected = whole[name] if BLOCK["unet", name] == "mid" else base[name]
        assert same_bytes(tensor, expected)


def test_the_base_gives_vae_and_facts_and_stands_first(toy: Taken, other: Taken) -> None:
    assert list(method("ties").signature.roles) == ["base", "checkpoints"]
    plan = planned("task_arithmetic", [toy, other])
    assert plan.identities() == {part: other.identity(part) for part in ("unet", "text_encoder")}


def test_the_order_in_which_a_recipe_names_checkpoints_is_no_change(toy: Taken, other: Taken) -> None:
    there = planned("linear", [toy, other], weights=[0.6, 0.4]).identities()
    assert planned("linear", [other, toy], weights=[0.4, 0.6]).identities() == there
    assert planned("linear", [other, toy], weights=[0.6, 0.4]).identities() != there


DELTA = """
[subtract.learned]
a = "ink"
b = "flat"

[add.x]
a = "flat"
delta = "learned"
weight = 0.5
"""


def test_a_delta_is_no_checkpoint_and_has_what_was_computed_alone(world: World) -> None:
    world.recipe(DELTA)
    steps = world.plan().steps
    delta, whole = steps["r:learned"].artifact, steps["r:x"].artifact
    assert delta is not None
    assert whole is not None
    assert (delta.kind, set(delta.components)) == ("delta", {"unet", "text_encoder"})
    assert (whole.kind, set(whole.components)) == ("checkpoint", {"unet", "text_encoder", "vae", "tokenizer"})
    assert steps["r:learned"].state == "build"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('delta = "learned"', 'delta = "ink"', "`ink` is a checkpoint, and a delta belongs here"),
        ('a = "flat"\ndelta', 'a = "learned"\ndelta', "`learned` is a delta, and a checkpoint belongs here"),
    ],
)
def test_deltas_and_checkpoints_are_not_mistaken_for_each_other(old: str, new: str, message: str, world: World) -> None:
    world.recipe(DELTA.replace(old, new))
    assert message in world.misfits()


@pytest.mark.parametrize("checkpoints", [[], ["flat"]])
def test_model_stock_wants_two_checkpoints(checkpoints: list[str]) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        method("model_stock").table.model_validate({"base": "flat", "checkpoints": checkpoints})


# -- special tensors (reference on merge methods, §3) ------------------------------------------------------------------


def test_what_no_program_uses_stays_the_firsts_and_may_be_missing(tmp_path: Path) -> None:
    x, scale = torch.ones(2), torch.tensor(4.6)
    name = "conv_in.bias"
    taken = _pair(tmp_path, {name: x, "text.logit_scale": scale}, {name: x * 3, "text.logit_scale": scale * 2})
    found = made(planned("weighted_sum", taken, weights=[0.5, 0.5]), *taken)["unet"]
    assert same_bytes(found["text.logit_scale"], scale)
    assert found[name].tolist() == [2, 2]
    with_, without = taken[0], keep(tmp_path / "c", {"unet": {name: x}})
    for pair in ([with_, without], [without, with_]):
        merged = made(planned("weighted_sum", pair, weights=[0.5, 0.5]), *pair)["unet"]
        assert set(merged) == set(pair[0].tensors("unet"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float16])
def test_position_ids_are_never_merged(dtype: torch.dtype, tmp_path: Path) -> None:
    """Computed in fp32 and cut to whole numbers, as CLIP uses them, 22 of 77 come out wrong (fact T32)."""
    ids = torch.arange(77)
    assert int(((ids.float() * 0.9 + ids.float() * 0.1).long() != ids).sum()) == 22
    name = "text_model.embeddings.position_ids"
    tensors = {"conv_in.bias": torch.ones(2), name: ids.to(dtype)}
    taken = _pair(tmp_path, tensors, tensors | {"conv_in.bias": torch.zeros(2), name: ids.to(dtype) + 1})
    found = made(planned("weighted_sum", taken, weights=[0.9, 0.1]), *taken)["unet"]
    assert same_bytes(found[name], ids.to(dtype))
    assert found["conv_in.bias"].tolist() == pytest.approx([0.9, 0.9])


def test_what_predicts_noise_and_what_predicts_v_are_not_merged_unless_it_is_said(toy: Taken, other: Taken) -> None:
    v = replace(other, artifact=replace(other.artifact, facts={"prediction": "v_prediction"}))
    with pytest.raises(UsageError, match="predicts epsilon cannot be merged with one that predicts v_prediction"):
        summed(toy, v, weights=[0.5, 0.5])
    assert summed(v, v, weights=[0.5, 0.5]).facts == {}
    stated = [summed(toy, v, weights=[0.5, 0.5], prediction=word) for word in ("epsilon", "v_prediction")]
    assert [plan.facts for plan in stated] == [{"prediction": None}, {"prediction": "v_prediction"}]
    assert stated[0].identities() == summed(toy, other, weights=[0.5, 0.5]).identities()


@pytest.mark.parametrize(("shape", "hint"), [((4, 2), "one has more words"), ((3, 4), "")])
def test_token_tables_of_other_lengths_are_told_from_other_widths(
    shape: tuple[int, int], hint: str, tmp_path: Path
) -> None:
    name = "text_model.embeddings.token_embedding.weight"
    one, two = (
        keep(tmp_path / str(i), {"text_encoder": {name: torch.ones(size).half()}})
        for i, size in enumerate([(3, 2), shape])
    )
    with pytest.raises(UsageError, match=r"weighted_sum cannot combine text_encoder\.") as caught:
        summed(one, two, weights=[0.5, 0.5])
    assert caught.value.hint.startswith(hint)
    assert bool(caught.value.hint) == bool(hint)
