"""Baking: LoRAs become weights, all at once, rounded once, and every factor finds its layer."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sdforge.edits import bake
from sdforge.edits.bake import compute
from sdforge.errors import ActionFailed, UsageError
from sdforge.families import family
from sdforge.formula import Plan
from sdforge.run.tensors import rounded
from tests.families.loras import CROSS, LINEAR, MODULES, NARROW, TEXT, WIDE, Factors, Lora, kept_lora, live, random_lora
from tests.families.workbench import SD15, Taken, digest, keep, made, same_bytes

VECTORS = Path(__file__).parent / "vectors.json"


@pytest.fixture(scope="module")
def lora(toy: Taken) -> Lora:
    return random_lora(toy, alphas=(1.0, 2.0, 0.5))


@pytest.fixture(scope="module")
def second(toy: Taken) -> Lora:
    return random_lora(toy, seed=1, alphas=(3.0,))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loras")


def planned(base: Taken, loras: list[tuple[Taken, Any]], dtype: str = "") -> Plan:
    """Plan a bake of LoRAs, each with a strength or a table of strengths."""
    uses = [use if isinstance(use, dict) else {"strength": use} for _, use in loras]
    table = bake.Bake.model_validate(
        {"checkpoint": "base", "loras": {f"l{i}": use for i, use in enumerate(uses)}, "dtype": dtype}
    )
    inputs = [taken.input(**use) for (taken, _), use in zip(loras, uses, strict=True)]
    return bake.plan(table, {"checkpoint": [base.input()], "loras": inputs}, SD15)


def baked(
    base: Taken, loras: list[tuple[Taken, Any]], dtype: str = "", only: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return module's weight → baked, over all components. only: the weights of those to be computed that are."""
    found = made(planned(base, loras, dtype), base, *(taken for taken, _ in loras), only=only)
    return {f"{component}.{name}": tensor for component, table in found.items() for name, tensor in table.items()}


def weights(base: Taken) -> dict[str, Tensor]:
    return {f"{c}.{name}": t for c in base.tables for name, t in base.tensors(c).items()}


def exact(weight: Tensor, *updates: Tensor) -> Tensor:
    total = weight.double().reshape(weight.shape[0], -1)
    return (total + torch.stack(updates).sum(0)).reshape(weight.shape)


def test_a_baked_weight_is_what_the_formula_says(toy: Taken, lora: Lora, work: Path) -> None:
    result, before = baked(toy, [(kept_lora(work / "a", lora), 0.8)]), weights(toy)
    for module, factors in lora.items():
        name = f"{module}.weight"
        assert torch.equal(result[name], exact(before[name], 0.8 * factors.update).float().half()), module


def test_what_no_lora_touches_passes_through(toy: Taken, lora: Lora, work: Path) -> None:
    plan = planned(toy, [(kept_lora(work / "b", lora), 0.8)])
    changed = {f"{c}.{row.tensor.name}" for c, rows in plan.components.items() for row in rows if row.method}
    assert changed == {f"{module}.weight" for module in lora}
    assert "vae" not in plan.components
    result, before = made(plan, toy, kept_lora(work / "b2", lora)), toy.tensors("unet")
    assert all(same_bytes(t, before[n]) for n, t in result["unet"].items() if f"unet.{n}" not in changed)


def test_a_lora_for_the_unet_leaves_the_text_encoder_its_name(toy: Taken, work: Path) -> None:
    plan = planned(toy, [(kept_lora(work / "c", random_lora(toy, (LINEAR,))), 1.0)])
    assert set(plan.components) == {"unet"}


def test_two_loras_are_their_sum_and_their_order_is_no_matter(toy: Taken, lora: Lora, second: Lora, work: Path) -> None:
    one, two = (kept_lora(work / "d", lora), 0.7), (kept_lora(work / "e", second), -0.4)
    assert planned(toy, [one, two]).identities() == planned(toy, [two, one]).identities()
    there, back, before = baked(toy, [one, two], "fp32"), baked(toy, [two, one], "fp32"), weights(toy)
    for module in MODULES:
        name = f"{module}.weight"
        expected = exact(before[name], 0.7 * lora[module].update, -0.4 * second[module].update)
        assert same_bytes(there[name], back[name])
        assert torch.allclose(there[name].double(), expected, rtol=2**-23, atol=1e-9)


def test_several_loras_are_rounded_once(toy: Taken, lora: Lora, second: Lora, work: Path) -> None:
    one, two = kept_lora(work / "f", lora), kept_lora(work / "g", second)
    together = baked(toy, [(one, 1.0), (two, 1.0)])
    after_one = baked(toy, [(one, 1.0)])
    name = f"{LINEAR}.weight"
    twice = exact(after_one[name], second[LINEAR].update).float().half()
    assert not torch.equal(together[name], twice)


def test_a_lora_and_its_opposite_cancel(toy: Taken, lora: Lora, work: Path) -> None:
    kept = kept_lora(work / "h", lora)
    result, before = baked(toy, [(kept, 0.6), (kept, -0.6)]), weights(toy)
    assert all(torch.equal(tensor, before[name]) for name, tensor in result.items())


def test_strength_is_linear(toy: Taken, lora: Lora, work: Path) -> None:
    kept, before, name = kept_lora(work / "i", lora), weights(toy), f"{WIDE}.weight"
    half, whole = (baked(toy, [(kept, s)], "fp32")[name].double() - before[name].double() for s in (0.5, 1.0))
    assert torch.allclose(2 * half, whole, atol=1e-6)


def test_strength_zero_changes_nothing(toy: Taken, lora: Lora, work: Path) -> None:
    plan = planned(toy, [(kept_lora(work / "j", lora), 0.0)])
    assert plan.components == {}


def touched(plan: Plan) -> dict[str, float]:
    return {
        f"{c}.{row.tensor.name}".removesuffix(".weight"): row.parameters["scales"][0]
        for c, rows in plan.components.items()
        for row in rows
        if row.method == "bake"
    }


def test_a_component_may_have_a_strength_of_its_own(toy: Taken, work: Path) -> None:
    kept = kept_lora(work / "k", random_lora(toy, alphas=(2.0,)))
    scales = touched(planned(toy, [(kept, {"strength": 0.5, "text_encoder": 0.25})]))
    assert (scales[LINEAR], scales[TEXT]) == (0.5, 0.25)
    assert TEXT not in touched(planned(toy, [(kept, {"text_encoder": 0.0})]))


def test_a_block_may_have_a_strength_of_its_own(toy: Taken, work: Path) -> None:
    kept = kept_lora(work / "l", random_lora(toy, alphas=(2.0,)))
    scales = touched(planned(toy, [(kept, {"strength": 0.5, "unet": 0.75, "blocks": {"unet.mid": 0.1, "IN01": 0.0}})]))
    assert scales[CROSS] == 0.1
    assert scales[NARROW] == 0.75
    assert LINEAR not in scales
    assert scales[TEXT] == 0.5


def test_alpha_over_rank_is_made_on_decimals(toy: Taken, work: Path) -> None:
    up, down, _ = random_lora(toy, (LINEAR,))[LINEAR]
    kept = kept_lora(work / "m", {LINEAR: Factors(up, down, 0.3)})
    assert touched(planned(toy, [(kept, 0.1)])) == {LINEAR: 0.015}


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_result_has_the_declared_type_in_every_network(dtype: str, toy: Taken, lora: Lora, work: Path) -> None:
    plan = planned(toy, [(kept_lora(work / f"n{dtype}", lora), 0.8)], dtype)
    stored = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}[dtype]
    assert plan.dtypes() == {"unet": stored, "text_encoder": stored}


def test_the_type_in_which_a_bake_is_rounded_is_a_part_of_its_name(toy: Taken, lora: Lora, work: Path) -> None:
    """Other bytes must not be taken for it: a `fuse_lora` in half precision is not one in fp32 that is cast."""
    kept = [(kept_lora(work / "q", lora), 0.8)]
    names = {dtype: planned(toy, kept, dtype).identities()["unet"] for dtype in ("", "fp16", "bf16", "fp32")}
    assert names[""] == names["fp16"]  # the checkpoint's own
    assert len(set(names.values())) == 3


def test_a_module_that_the_family_lacks_is_named_with_the_nearest(toy: Taken, work: Path) -> None:
    kept = keep(work / "o", {"lora": {"unet.mid_blok.x.lora_down": torch.ones(1, 2)}}, kind="lora")
    with pytest.raises(UsageError, match=r"changes unet\.mid_blok\.x, which Stable Diffusion 1\.x does not have"):
        planned(toy, [(kept, 1.0)])


def test_a_layer_that_the_checkpoint_lacks_is_named(toy: Taken, work: Path) -> None:
    deep = TEXT.replace("layers.1", "layers.7")
    factors = Factors(torch.ones(32, 1), torch.ones(1, 16), 1.0)
    with pytest.raises(UsageError, match=r"changes 1 layer that the checkpoint does not have: .*layers\.7\.mlp\.fc1"):
        planned(toy, [(kept_lora(work / "p", {deep: factors}), 1.0)])


@pytest.mark.parametrize(
    ("module", "up", "down"),
    [
        (LINEAR, (8, 2), (2, 9)),
        (LINEAR, (9, 2), (2, 8)),
        (WIDE, (8, 2), (2, 8)),
        (WIDE, (8, 2), (2, 8, 1, 1)),
        (LINEAR, (8, 2), (2, 8, 3, 3)),
    ],
)
def test_factors_of_other_widths_are_refused(
    module: str, up: tuple[int, ...], down: tuple[int, ...], toy: Taken, tmp_path: Path
) -> None:
    lora = kept_lora(tmp_path, {module: Factors(torch.ones(up), torch.ones(down), 2.0)})
    with pytest.raises(UsageError, match="do not fit"):
        planned(toy, [(lora, 1.0)])


@pytest.mark.parametrize(
    ("module", "down", "hint"),
    [
        (WIDE, (2, 8), "the LoRA is for a kernel of 1×1 there, and this layer has one of 3×3"),
        (LINEAR, (2, 8, 3, 3), "the LoRA is for a kernel of 3×3 there, and this layer has one of 1×1"),
        (LINEAR, (2, 9), "it was made for a checkpoint of other widths"),
        (LINEAR, (3, 8), "whatever wrote them was wrong, or the file is damaged"),
    ],
)
def test_why_factors_do_not_fit_is_said(
    module: str, down: tuple[int, ...], hint: str, toy: Taken, tmp_path: Path
) -> None:
    lora = kept_lora(tmp_path, {module: Factors(torch.ones(8, 2), torch.ones(down), 2.0)})
    with pytest.raises(UsageError, match="do not fit") as caught:
        planned(toy, [(lora, 1.0)])
    assert caught.value.hint.startswith(hint)


def test_nan_and_overflow_stop_with_the_tensors_name(toy: Taken, tmp_path: Path) -> None:
    sick = Factors(torch.full((8, 2), torch.nan), torch.ones(2, 8), 2.0)
    with pytest.raises(ActionFailed, match=r"unet\..*attn1\.to_q\.weight.*NaN or Inf"):
        baked(toy, [(kept_lora(tmp_path / "a", {LINEAR: sick}), 1.0)])
    big = Factors(torch.full((8, 2), 300.0), torch.full((2, 8), 300.0), 2.0)
    with pytest.raises(ActionFailed, match=r"attn1\.to_q\.weight holds .* does not fit into float16"):
        baked(toy, [(kept_lora(tmp_path / "b", {LINEAR: big}), 1.0)])


def network(taken: Taken, part: str) -> nn.Module:
    from sdforge.families.sd15.load import load

    diffusion = load(taken.given(), torch.device("cpu"), torch.float32)
    return diffusion.unet if part == "unet" else diffusion.text_encoders[part]


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_baked_network_says_what_pefts_live_layers_say(part: str, toy: Taken, lora: Lora, tmp_path: Path) -> None:
    own = {module: factors for module, factors in lora.items() if module.startswith(part)}
    base, peft = network(toy, part), network(toy, part)
    live(peft, part, own)
    ours = copy.deepcopy(base)
    result = baked(toy, [(kept_lora(tmp_path, own), 1.0)], "fp32")
    table = {n.removeprefix(f"{part}.").removeprefix("text_model."): t for n, t in result.items() if n.startswith(part)}
    ours.load_state_dict(table, strict=True)
    draw = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {"input_ids": torch.arange(77)[None]}
    if part == "unet":
        latents, text = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 77, 16, generator=draw)
        given = {"sample": latents, "timestep": 500, "encoder_hidden_states": text}
    with torch.no_grad():
        before, theirs, mine = (net(**given)[0] for net in (base, peft, ours))
    effect = float((theirs - before).abs().max())
    assert effect > 1e-3
    assert float((theirs - mine).abs().max()) <= 2e-6 * max(effect, float(before.abs().max()))


def bits(dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    """Numbers that are the same in every version of numpy."""
    whole = np.random.RandomState(seed).randint(-(2**15), 2**15, shape)
    return torch.from_numpy(whole / 2**14).to(dtype)


def baked_vector(name: str) -> Tensor:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]
    weight = bits(dtype, 320, 96, 3, 3, seed=1)
    factors = []
    for seed, rank in ((2, 8), (3, 130)):
        factors += [bits(torch.float32, 320, rank, seed=seed), bits(torch.float32, rank, 96, 3, 3, seed=seed + 10)]
    return rounded(name, compute({"scales": [0.4, -0.1]}, [weight, *factors], dtype), dtype)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_a_bake_gives_the_committed_bytes(dtype: str) -> None:
    """`vectors.json`: dtype → sha256. A change of it is a change of every preset: raise the version of bake."""
    assert digest(baked_vector(dtype)) == json.loads(VECTORS.read_text())["bake"][dtype]


def test_the_number_of_threads_changes_no_bit() -> None:
    threads = torch.get_num_threads()
    try:
        digests = set()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            digests.add(digest(baked_vector("fp16")))
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


def test_the_vectors_inputs_are_what_they_were() -> None:
    data = bits(torch.float32, 100, seed=1).numpy().tobytes()
    assert hashlib.sha256(data).hexdigest() == json.loads(VECTORS.read_text())["inputs"]


def test_the_toys_family_is_the_one_that_is_tested() -> None:
    assert family("sd15") is SD15
