"""Baking image embeddings: a checkpoint that draws from one whatever it is shown, or that is shown nothing any more."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdforge.edits import bake, fix_image
from sdforge.errors import UsageError
from sdforge.families import family
from sdforge.formula import Plan
from sdforge.run.diffusion import Conditioning, Diffusion
from tests.families.toys import write_family
from tests.families.workbench import Taken, keep, made, take

WIDTH = 12  # of the toys' image embeddings
CLOSE = 1e-5


def toy_of(toys: Path, name: str) -> Taken:
    """Return a toy in fp32, so that no rounding hides a mistake."""
    return take(write_family(toys / f"{name}-fp32", name, dtype=torch.float32))


def loaded(taken: Taken) -> Diffusion:
    load = importlib.import_module(f"sdforge.families.{taken.artifact.family}.load").load
    found: Diffusion = load(taken.given(), torch.device("cpu"), torch.float32)
    return found


def embedding(seed: int = 0) -> Tensor:
    return torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(seed))


def kept(work: Path, base: Taken, image_1D: Tensor) -> Taken:
    """Return an embedding as a training leaves it."""
    with torch.no_grad():
        told = loaded(base).imagine(image_1D)
    tensors = {"image_embeds": image_1D, **told.added}
    return keep(work, {"image_embedding": tensors}, kind="image_embedding", name=base.artifact.family)


def planned(base: Taken, image: Taken, strength: float = 1.0, dtype: str = "") -> Plan:
    use = {"strength": strength}
    raw = {"checkpoint": "base", "image_embeddings": {"look": use}, "dtype": dtype}
    inputs = {"checkpoint": [base.input()], "image_embeddings": [image.input(**use)]}
    return bake.plan(bake.Bake.model_validate(raw), inputs, family(base.artifact.family))


def with_components(work: Path, base: Taken, plan: Plan, *taken: Taken) -> Taken:
    """Return a checkpoint with the components that a plan makes."""
    tensors = {name: base.tensors(name) for name in base.tables if name not in plan.without}
    tensors |= made(plan, base, *taken)
    facts: dict[str, Any] = base.artifact.facts | plan.facts
    facts = {name: value for name, value in facts.items() if value is not None}
    return keep(work, tensors, facts=facts, words=base.vocabulary, name=plan.family or base.artifact.family)


def predicted(diffusion: Diffusion, condition: Conditioning) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    noisy = torch.randn(2, 4, 8, 8, generator=draw)
    with torch.no_grad():
        return diffusion.predict(noisy, torch.tensor([40, 800]), condition.take([0, 0]))


@pytest.mark.parametrize("name", ["unclip", "image_variations"])
def test_a_baked_embedding_is_drawn_whatever_is_shown(name: str, toys: Path, tmp_path: Path) -> None:
    base, image_1D = toy_of(toys, name), embedding()
    image = kept(tmp_path / "image", base, image_1D)
    baked = loaded(with_components(tmp_path / "baked", base, planned(base, image), image))
    plain = loaded(base)
    wanted = predicted(plain, plain.imagine(image_1D))
    for shown in (baked.imagine(embedding(1)), baked.imagine(image_1D), baked.encode_negative([""])):
        assert torch.allclose(predicted(baked, shown), wanted, atol=CLOSE)
    assert not torch.allclose(predicted(plain, plain.imagine(embedding(1))), wanted, atol=1e-3)


@pytest.mark.parametrize("name", ["unclip", "image_variations"])
def test_strength_0_changes_nothing_and_half_is_between(name: str, toys: Path, tmp_path: Path) -> None:
    base = toy_of(toys, name)
    image = kept(tmp_path / "image", base, embedding())
    assert planned(base, image, 0.0).components == {}
    whole, half = (made(planned(base, image, s), base, image)["unet"] for s in (1.0, 0.5))
    before = base.tensors("unet")
    changed = [n for n in before if not torch.equal(before[n], whole[n])]
    assert changed
    assert all(torch.allclose(half[n], (before[n] + whole[n]) / 2, atol=1e-6) for n in changed)


def test_only_the_layers_that_take_the_picture_change(toys: Path, tmp_path: Path) -> None:
    base = toy_of(toys, "unclip")
    image = kept(tmp_path, base, embedding())
    rows = planned(base, image).components["unet"]
    assert {r.tensor.name for r in rows if r.method} == {
        "class_embedding.linear_2.weight",
        "class_embedding.linear_2.bias",
    }
    variations = toy_of(toys, "image_variations")
    other = kept(tmp_path / "other", variations, embedding())
    names = {r.tensor.name for r in planned(variations, other).components["unet"] if r.method}
    assert names == {n for n in variations.tensors("unet") if n.endswith(("attn2.to_v.weight", "attn2.to_out.0.bias"))}


def test_a_checkpoint_that_is_shown_nothing_is_refused(toy: Taken, toys: Path, tmp_path: Path) -> None:
    image = kept(tmp_path, toy_of(toys, "unclip"), embedding())
    with pytest.raises(UsageError, match="has no place for an image embedding"):
        planned(toy, image)


def test_an_embedding_of_another_width_is_refused(toys: Path, tmp_path: Path) -> None:
    for name, tensors in (
        ("unclip", {"image_embeds": torch.ones(1, 5), "class_labels": torch.ones(1, 10)}),
        ("image_variations", {"image_embeds": torch.ones(1, 5)}),
    ):
        image = keep(tmp_path / name, {"image_embedding": tensors}, kind="image_embedding", name=name)
        with pytest.raises(UsageError, match="numbers wide"):
            planned(toy_of(toys, name), image)


def fixed(base: Taken, image: Taken) -> Plan:
    table = fix_image.FixImage.model_validate({"checkpoint": "base", "image": "look"})
    inputs = {"checkpoint": [base.input()], "image": [image.input()]}
    return fix_image.plan(table, inputs, family(base.artifact.family))


def test_a_checkpoint_with_its_image_fixed_draws_from_words_alone(toys: Path, tmp_path: Path) -> None:
    """It is of the family without pictures, whose loader takes it, and says what it said when it was shown them."""
    base, image_1D = toy_of(toys, "unclip"), embedding()
    image = kept(tmp_path / "image", base, image_1D)
    plan = fixed(base, image)
    result = with_components(tmp_path / "plain", base, plan, image)
    assert result.artifact.family == "sd2"
    assert set(result.tables) == {"unet", "text_encoder", "vae"}
    assert not any(name.startswith("class_embedding") for name in result.tensors("unet"))
    shown, plain = loaded(base), loaded(result)
    for prompt in ("", "a red cat"):
        wanted = predicted(shown, shown.imagine(image_1D, [prompt]))
        assert torch.allclose(predicted(plain, plain.encode_text([prompt])), wanted, atol=CLOSE)


def test_facts_go_over_into_the_other_family(toys: Path, tmp_path: Path) -> None:
    base = toy_of(toys, "unclip")
    image = kept(tmp_path / "b", base, embedding())
    result = with_components(tmp_path / "a", base, fixed(base, image), image)
    ours, theirs, facts = family("unclip"), family("sd2"), base.artifact.facts
    assert all(
        theirs.fact(result.artifact.facts, n) == ours.fact(facts, n) for n in theirs.neutral if n in ours.neutral
    )
    assert set(result.artifact.facts) <= set(theirs.neutral)


def test_a_picture_is_fixed_in_no_checkpoint_without_a_unet(toys: Path, tmp_path: Path) -> None:
    base = toy_of(toys, "unclip")
    components = {name: each for name, each in base.artifact.components.items() if name != "unet"}
    with pytest.raises(UsageError, match="has no unet, into which a picture could be built"):
        fixed(replace(base, artifact=replace(base.artifact, components=components)), kept(tmp_path, base, embedding()))


def test_variations_are_no_other_family_without_their_picture(toys: Path, tmp_path: Path) -> None:
    base = toy_of(toys, "image_variations")
    with pytest.raises(UsageError, match="is no checkpoint of another family") as caught:
        fixed(base, kept(tmp_path, base, embedding()))
    assert "bake" in caught.value.hint
