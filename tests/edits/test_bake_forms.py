"""Baking LoRA's relatives: what each form makes of a weight, by formulas of our own, by PEFT, and at any strength."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdforge.edits.bake import compute
from sdforge.errors import UsageError
from sdforge.run.tensors import rounded
from tests.edits.test_bake import VECTORS, baked, bits, network, planned, weights
from tests.families.forms import CASES, MERELY_ADDED, WIDE, Case, changed, random_factors
from tests.families.loras import LINEAR, TEXT, kept_lora, random_lora
from tests.families.workbench import Taken, digest, keep, take

FLAT = "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"  # (64, 8)
NARROW = "unet.down_blocks.2.attentions.0.proj_in"  # a 1×1 convolution
KERNEL = "unet.down_blocks.2.resnets.0.conv1"  # (16, 8, 3, 3)
ALL = {**CASES, **WIDE}
EACH = pytest.mark.parametrize("name", ALL)


def kept(work: Path, modules: tuple[str, ...], case: Case, base: dict[str, Tensor]) -> Taken:
    tensors = {
        f"{module}.{name}": factor
        for i, module in enumerate(modules)
        for name, factor in random_factors(case, shape(base, module), seed=i).items()
    }
    facts = {"alpha": case.alpha} if case.alpha else {}
    return keep(work, {"lora": tensors}, kind="lora", facts=facts | case.facts)


def shape(base: dict[str, Tensor], module: str) -> tuple[int, ...]:
    found = tuple(base[f"{module}.weight"].shape)
    return found[:2] if found[2:] == (1, 1) else found


def places(name: str) -> tuple[str, ...]:
    return (KERNEL,) if name in WIDE else (FLAT, NARROW, KERNEL)


@EACH
@pytest.mark.parametrize("strength", [1.0, 0.5, -0.7])
def test_a_baked_weight_is_what_the_forms_formula_says(name: str, strength: float, toy: Taken, tmp_path: Path) -> None:
    """At another strength than 1 it lies on the line between W and W′, whatever the form."""
    before, case = weights(toy), ALL[name]
    loras = [(kept(tmp_path, places(name), case, before), strength)]
    result = baked(toy, loras, "fp32", [f"{module}.weight" for module in places(name)])
    for i, module in enumerate(places(name)):
        weight = before[f"{module}.weight"].double()
        small = weight.reshape(shape(before, module))
        after = changed(case, small, random_factors(case, tuple(small.shape), seed=i)).reshape(weight.shape)
        expected = weight + strength * (after - weight)
        assert float((after - weight).norm() / weight.norm()) > 0.02
        error = result[f"{module}.weight"].double() - expected
        assert float(error.abs().max()) <= 2**-23 * float(expected.abs().max()), module


@EACH
def test_at_strength_zero_nothing_is_computed(name: str, toy: Taken, tmp_path: Path) -> None:
    assert planned(toy, [(kept(tmp_path, places(name), ALL[name], weights(toy)), 0.0)]).components == {}


@EACH
def test_a_form_and_its_opposite_cancel(name: str, toy: Taken, tmp_path: Path) -> None:
    """Every change is taken against the same W, so this holds for what replaces W as well."""
    lora, before = kept(tmp_path, places(name), ALL[name], weights(toy)), weights(toy)
    result = baked(toy, [(lora, 0.6), (lora, -0.6)])
    assert all(torch.equal(tensor, before[place]) for place, tensor in result.items())


def test_forms_of_many_kinds_are_baked_together_in_any_order(toy: Taken, tmp_path: Path) -> None:
    before = weights(toy)
    names = [name for name in CASES if name != "lora"]
    loras = [(kept(tmp_path / str(i), (FLAT,), CASES[name], before), 0.3) for i, name in enumerate(names)]
    loras.append((kept_lora(tmp_path / "plain", random_lora(toy, (FLAT,))), 0.3))
    there, back = planned(toy, loras), planned(toy, loras[::-1])
    assert there.identities() == back.identities()
    weight = before[f"{FLAT}.weight"].double()
    total = weight + 0.3 * random_lora(toy, (FLAT,))[FLAT].update
    for name in names:
        case = CASES[name]
        total = total + 0.3 * (changed(case, weight, random_factors(case, tuple(weight.shape))) - weight)
    assert float((baked(toy, loras, "fp32", [f"{FLAT}.weight"])[f"{FLAT}.weight"].double() - total).abs().max()) < 1e-6


def test_one_lora_may_hold_forms_of_several_kinds_and_plain_ones_keep_their_name(toy: Taken, tmp_path: Path) -> None:
    before, plain = weights(toy), random_lora(toy, (LINEAR,))
    alone = planned(toy, [(kept_lora(tmp_path / "a", plain), 1.0)])
    tensors = {f"{LINEAR}.lora_{side}": getattr(plain[LINEAR], side) for side in ("up", "down")}
    tensors |= {f"{FLAT}.{n}": f for n, f in random_factors(CASES["loha"], shape(before, FLAT)).items()}
    facts = {"alpha": {LINEAR: 2.0, FLAT: 1.5}}
    both = planned(toy, [(keep(tmp_path / "b", {"lora": tensors}, kind="lora", facts=facts), 1.0)])

    def name(plan: Any, module: str) -> str:
        rows = {f"unet.{row.tensor.name}": row.tensor.identity for row in plan.components["unet"]}
        return str(rows[f"{module}.weight"])

    assert name(alone, LINEAR) == name(both, LINEAR)
    assert name(alone, FLAT) != name(both, FLAT)


def test_biases_and_norms_are_changed_where_a_lora_says_so(toy: Taken, tmp_path: Path) -> None:
    norm, bias = "unet.conv_norm_out", TEXT
    before = weights(toy)
    tensors = {
        f"{norm}.w_norm": torch.full((8,), 0.5),
        f"{norm}.b_norm": torch.full((8,), 0.25),
        f"{bias}.diff_b": torch.full((32,), 0.125),
    }
    lora = keep(tmp_path, {"lora": tensors}, kind="lora")
    result = baked(toy, [(lora, 0.5)], "fp32")
    for name, change in ((f"{norm}.weight", 0.25), (f"{norm}.bias", 0.125), (f"{bias}.bias", 0.0625)):
        assert torch.equal(result[name], before[name].float() + change)


def test_a_row_of_zeros_has_no_direction_and_stays() -> None:
    case = CASES["dora of rows"]
    factors = random_factors(case, (8, 8))
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    weight[3], factors["lora_up"][3] = 0, 0
    own = {"form": "lora", "factors": list(factors), "scale": 0.5, "strength": 1.0}
    result = compute({"updates": [["lora", 3, own]]}, [weight, *factors.values()], torch.float16)
    assert not result[3].any()
    assert bool(torch.isfinite(result).all())


@pytest.mark.parametrize(
    "sizes",
    [
        {"hada_w1_a": (64, 2), "hada_w1_b": (2, 8), "hada_w2_a": (64, 3), "hada_w2_b": (2, 8)},
        {"lokr_w1": (4, 2), "lokr_w2": (16, 5)},
        {"oft_blocks": (3, 4, 4)},
        {"oft_r": (3, 6)},
        {"oft_r": (2, 7)},
        {"ia3": (8, 1)},
        {"lora_up": (64, 2), "lora_down": (2, 8), "dora_scale": (8, 1)},
        {"a1": (9, 2), "a2": (2, 9), "b1": (64, 2), "b2": (2, 9)},
        {"diff": (64, 9)},
    ],
)
def test_factors_of_other_widths_are_refused(sizes: dict[str, tuple[int, ...]], toy: Taken, tmp_path: Path) -> None:
    lora = keep(tmp_path, {"lora": {f"{FLAT}.{n}": torch.ones(s) for n, s in sizes.items()}}, kind="lora")
    with pytest.raises(UsageError, match="do not fit"):
        planned(toy, [(lora, 1.0)])


def test_factors_of_no_form_are_refused(toy: Taken, tmp_path: Path) -> None:
    lora = keep(tmp_path, {"lora": {f"{FLAT}.hada_w1_a": torch.ones(64, 2)}}, kind="lora")
    with pytest.raises(UsageError, match=f"hada_w1_a for {FLAT}, which is no form"):
        planned(toy, [(lora, 1.0)])


# -- PEFT --------------------------------------------------------------------------------------------------------------


def peft_configs() -> dict[str, Any]:
    from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig

    where = {"target_modules": [m.removeprefix("unet.") for m in (FLAT, NARROW, KERNEL)]}
    return {
        "lora": LoraConfig(r=3, lora_alpha=5, **where),
        "rslora": LoraConfig(r=3, lora_alpha=5, use_rslora=True, **where),
        "dora": LoraConfig(r=3, lora_alpha=5, use_dora=True, **where),
        "loha": LoHaConfig(r=3, alpha=5, **where),
        "loha with cores": LoHaConfig(r=3, alpha=5, use_effective_conv2d=True, **where),
        "lokr": LoKrConfig(r=2, alpha=5, decompose_factor=2, **where),
        "lokr, none whole": LoKrConfig(r=1, alpha=5, decompose_both=True, **where),
        "lokr with a core": LoKrConfig(r=1, alpha=5, use_effective_conv2d=True, **where),
        "oft": OFTConfig(oft_block_size=4, use_cayley_neumann=False, **where),
        "oft, a series": OFTConfig(oft_block_size=4, **where),
        "oft, a short series": OFTConfig(oft_block_size=4, num_cayley_neumann_terms=3, **where),
    }


@pytest.mark.parametrize("name", peft_configs())
def test_a_folder_of_pefts_is_read_and_baked_as_peft_merges_it(name: str, toy: Taken, tmp_path: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = peft_configs()[name]
    unet: Any = network(toy, "unet")
    with torch.random.fork_rng():  # peft draws the start itself
        torch.manual_seed(0)
        unet.add_adapter(config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in unet.parameters() if p.requires_grad):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    tensors = get_peft_model_state_dict(unet, adapter_name="default")
    save_file(
        {f"base_model.model.{n}": t.contiguous() for n, t in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    config.save_pretrained(tmp_path)
    before = weights(toy)
    modules = (FLAT, NARROW, KERNEL)
    result = baked(toy, [(take(tmp_path), 1.0)], "fp32", [f"{module}.weight" for module in modules])
    for module in modules:
        layer: Any = unet.get_submodule(module.removeprefix("unet."))
        layer.merge()
        theirs, ours = layer.get_base_layer().weight, result[f"{module}.weight"]
        assert float((theirs - before[f"{module}.weight"]).abs().max()) > 0.005
        assert float((theirs - ours).abs().max()) <= 1e-6 * float(theirs.abs().max()), module


# -- sameness ----------------------------------------------------------------------------------------------------------

OWN: dict[str, dict[str, Any]] = {
    "loha": {"form": "loha", "scale": 0.4},
    "lokr, the first whole": {"form": "lokr", "scale": 0.4},
    "a core": {"form": "lora", "scale": 0.4},
    "glora": {"form": "glora", "scale": 0.4},
    "dora of rows": {"form": "lora", "scale": 0.5, "strength": 0.8},
    "oft with a limit": {"form": "oft", "strength": 0.8, "limit": 2.5},
    "boft": {"form": "oft", "strength": 0.8, "limit": 0.0},
    "oft of inputs": {"form": "oft_input", "strength": 0.8, "neumann": 0},
}


def vector(name: str, kind: str) -> str:
    dtype = {"fp16": torch.float16, "fp32": torch.float32}[kind]
    counter = iter(range(2, 99))
    size = (64, 48, 3, 3)
    factors = ALL[name].factors(size, lambda *s: 0.25 * bits(torch.float32, *s, seed=next(counter)))
    own = OWN[name] | {"factors": list(factors)}
    given = [bits(dtype, *size, seed=1), *(f.float() for f in factors.values())]
    return digest(rounded(name, compute({"updates": [["lora", len(factors), own]]}, given, dtype), dtype))


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("name", OWN)
def test_a_form_gives_the_committed_bytes_on_any_number_of_threads(name: str, dtype: str) -> None:
    expected = json.loads(VECTORS.read_text())["forms"][f"{name}, {dtype}"]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert vector(name, dtype) == expected
    finally:
        torch.set_num_threads(threads)


def test_what_is_merely_added_is_linear_in_its_strength(toy: Taken, tmp_path: Path) -> None:
    before, name = weights(toy), f"{FLAT}.weight"
    for i, case in enumerate(sorted(MERELY_ADDED - set(WIDE))):
        lora = kept(tmp_path / str(i), (FLAT,), CASES[case], before)
        (row,) = (r for r in planned(toy, [(lora, 0.5)]).components["unet"] if f"unet.{r.tensor.name}" == name)
        half, whole = (
            baked(toy, [(lora, s)], "fp32", [name])[name].double() - before[name].double() for s in (0.5, 1.0)
        )
        assert torch.allclose(2 * half, whole, atol=1e-6), (case, row.parameters)
