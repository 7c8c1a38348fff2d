"""LoRA files of diffusers' own kind: what we write, stock diffusers loads as it is meant, whatever ranks and alphas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from sdforge.errors import UsageError
from tests.families.forms import CASES, changed, random_factors
from tests.families.loras import DOWN, LINEAR, MODULES, TEXT, WIDE, Lora, kept_lora, live, random_lora
from tests.families.workbench import Taken, keep, take
from tests.formats.conftest import export
from tests.formats.test_lora_formats import pipeline_of, same


@pytest.fixture(scope="module")
def uneven(toy: Taken) -> Lora:
    """Ranks of 2 and 4, and three alphas."""
    return random_lora(toy, alphas=(1.0, 2.0, 0.5))


def written(work: Path, toy: Taken, lora: Taken) -> Path:
    export(work / "out", toy, ["loras-diffusers"], {}, loras=[lora.given()])
    path = work / "out" / "loras" / f"{lora.artifact.digest[:16]}.diffusers.safetensors"
    assert list(path.parent.iterdir()) == [path]
    return path


def test_it_is_read_again_as_the_same_lora(uneven: Lora, toy: Taken, tmp_path: Path) -> None:
    kept = kept_lora(tmp_path / "kept", uneven)
    taken = take(written(tmp_path, toy, kept))
    assert same(taken, uneven)
    assert taken.artifact.digest == kept.artifact.digest


def test_names_shapes_and_metadata_are_diffusers(uneven: Lora, toy: Taken, tmp_path: Path) -> None:
    with safe_open(written(tmp_path, toy, kept_lora(tmp_path / "kept", uneven)), "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        stated = file.metadata()
    assert shapes[f"{LINEAR}.lora_A.weight"] == (2, 8)
    assert (shapes[f"{DOWN}.lora_A.weight"], shapes[f"{DOWN}.lora_B.weight"]) == ((4, 8, 3, 3), (8, 4, 1, 1))
    assert TEXT.startswith("text_encoder.text_model.")
    assert f"{TEXT}.lora_linear_layer.up.weight" in shapes
    assert (stated["format"], stated["modelspec.architecture"]) == ("pt", "stable-diffusion-v1/lora")
    told = json.loads(stated["lora_adapter_metadata"])
    assert told["unet.rank_pattern"] == {module.removeprefix("unet."): 4 for module in (WIDE, DOWN)}
    assert told["text_encoder.target_modules"] == ["encoder.layers.1.mlp.fc1"]
    assert (told["text_encoder.r"], told["text_encoder.lora_alpha"]) == (2, 0.5)


def test_stock_diffusers_draws_with_it_as_with_the_lora(uneven: Lora, toy: Taken, tmp_path: Path) -> None:
    """Where its reader of kohya's files goes wrong (see test_lora_formats), its own file says every alpha."""
    pipeline, ours = pipeline_of(tmp_path, toy), pipeline_of(tmp_path, toy)
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 77, 16, generator=draw)
    ids = torch.tensor([pipeline.tokenizer("a red cat", padding="max_length", max_length=77).input_ids])

    def say(p: Any) -> list[Tensor]:
        with torch.no_grad():
            return [p.unet(latents, 500, encoder_hidden_states=text).sample, p.text_encoder(ids).last_hidden_state]

    before = say(pipeline)
    path = written(tmp_path / "lora", toy, kept_lora(tmp_path / "kept", uneven))
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    live(ours.unet, "unet", uneven)
    live(ours.text_encoder, "text_encoder", uneven)
    for old, theirs, mine in zip(before, say(pipeline), say(ours), strict=True):
        effect = float((mine - old).abs().max())
        assert effect > 1e-3
        assert float((theirs - mine).abs().max()) <= 2e-6 * max(effect, float(old.abs().max()))


DORA = CASES["dora of rows"]


def long(toy: Taken, modules: tuple[str, ...]) -> dict[str, Tensor]:
    """Return factors of DoRA per output for these modules."""
    found = {}
    for module in modules:
        component, _, path = module.partition(".")
        shape = tuple(toy.tensors(component)[f"{path}.weight"].shape)
        found |= {f"{module}.{factor}": t for factor, t in random_factors(DORA, shape, seed=len(found)).items()}
    return found


def test_stock_diffusers_makes_of_lengths_per_output_what_bake_makes(toy: Taken, tmp_path: Path) -> None:
    """A1111, ComfyUI and InvokeAI read such lengths otherwise, of kohya's files too."""
    factors = long(toy, (LINEAR, DOWN, TEXT, TEXT.replace("mlp.fc1", "self_attn.q_proj")))
    kept = keep(tmp_path / "kept", {"lora": factors}, kind="lora", facts={"alpha": DORA.alpha})
    path = written(tmp_path, toy, kept)
    assert take(path).artifact.digest == kept.artifact.digest
    pipeline, parts = pipeline_of(tmp_path, toy), ["unet", "text_encoder"]
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    pipeline.fuse_lora(components=parts)
    pipeline.unload_lora_weights()
    theirs = {component: getattr(pipeline, component).state_dict() for component in parts}
    for component, own in theirs.items():
        for name, weight in toy.tensors(component).items():
            found = own.get(name, own.get(name.removeprefix("text_model.")))
            module = f"{component}.{name.removesuffix('.weight')}"
            mine = {factor: factors.get(f"{module}.{factor}") for factor in ("lora_up", "lora_down", "dora_scale")}
            expected = changed(DORA, weight, mine) if mine["lora_up"] is not None else weight.double()  # type: ignore[arg-type]
            assert torch.allclose(found.double(), expected, atol=2e-6), name


def test_lengths_that_such_a_file_cannot_say_are_refused(toy: Taken, tmp_path: Path) -> None:
    per_input = {f"{LINEAR}.{factor}": t for factor, t in random_factors(CASES["dora of columns"], (8, 8)).items()}
    with pytest.raises(UsageError, match=f"{LINEAR} has lengths per input"):
        written(tmp_path / "a", toy, keep(tmp_path / "1", {"lora": per_input}, kind="lora"))
    some = long(toy, (LINEAR, DOWN))
    del some[f"{DOWN}.dora_scale"]
    with pytest.raises(UsageError, match=f"{DOWN} has no lengths"):
        written(tmp_path / "b", toy, keep(tmp_path / "2", {"lora": some}, kind="lora"))


@pytest.mark.parametrize("name", ["loha", "dora of a loha", "oft"])
def test_what_such_a_file_cannot_say_is_refused_with_the_way_out(name: str, toy: Taken, tmp_path: Path) -> None:
    factors = {f"{LINEAR}.{factor}": t for factor, t in random_factors(CASES[name], (8, 8)).items()}
    other = keep(tmp_path / "kept", {"lora": factors}, kind="lora")
    with pytest.raises(UsageError, match=f"{LINEAR} is no plain LoRA") as caught:
        written(tmp_path, toy, other)
    assert 'export = ["loras"]' in caught.value.hint


def test_one_rank_and_alpha_need_no_patterns(toy: Taken, tmp_path: Path) -> None:
    even = random_lora(toy, MODULES[:2], alphas=(2.0,))
    with safe_open(written(tmp_path, toy, kept_lora(tmp_path / "kept", even)), "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (told["unet.rank_pattern"], told["unet.alpha_pattern"]) == ({}, {})
    assert (told["unet.r"], told["unet.lora_alpha"]) == (2, 2.0)
