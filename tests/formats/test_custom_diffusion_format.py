"""Custom Diffusion's files: named as diffusers' processors name them, and the same after a round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, CustomDiffusionAttnProcessor
from safetensors.torch import load_file, save_file

from sdforge.errors import UsageError
from sdforge.formats.custom_diffusion import MATRICES, canonical_name, raw_name
from sdforge.trainings.custom_diffusion import chosen
from tests.families.workbench import SD15, UNET, Taken, keep, take
from tests.formats.conftest import export


def concept(base: Taken, work: Path, words: dict[str, int], names: tuple[str, ...] = SD15.cross_attention) -> Taken:
    """Return random matrices, and as many random rows for every word as it says."""
    draw, weights = torch.Generator().manual_seed(0), base.tensors("unet")
    tensors = {"custom": {f"unet.{n}": torch.randn(weights[n].shape, generator=draw) for n in names}}
    rows = [torch.randn(count, 16, generator=draw) for count in words.values()]
    if rows:
        tensors["embedding"] = {f"text_encoder.{i}" if i else "text_encoder": row for i, row in enumerate(rows)}
    first, *further = words or [""]
    facts: dict[str, Any] = ({"token": first} if first else {}) | ({"further": further} if further else {})
    return keep(work / "concept", tensors, kind="custom", facts=facts)


def written(base: Taken, one: Taken, work: Path) -> Path:
    export(work, base, ["custom"], {}, custom=[one.given()])
    (folder,) = (work / "custom").iterdir()
    return folder


def processors(unet: Any, *, whole: bool) -> set[str]:
    """Return the names of all tensors that diffusers' own processors have in a U-Net."""
    names = set()
    for name in unet.attn_processors:
        own = (
            CustomDiffusionAttnProcessor(train_kv=True, train_q_out=whole, hidden_size=8, cross_attention_dim=16)
            if name.endswith("attn2.processor")
            else AttnProcessor()
        )
        names |= {f"{name}.{key}" for key in own.state_dict()} if isinstance(own, torch.nn.Module) else set()
    return names


@pytest.mark.parametrize("freeze", ["kv", "attention"])
def test_matrices_are_named_as_diffusers_names_its_processors(freeze: str) -> None:
    ours = {raw_name(name) for name in chosen(SD15, freeze)}
    assert ours == processors(UNet2DConditionModel(**UNET), whole=freeze == "attention")
    assert {canonical_name(name) for name in ours} == set(chosen(SD15, freeze))


@pytest.mark.parametrize("words", [{"<toy>": 1}, {"<toy>": 3}, {"<a>": 1, "<b>": 2}, {}])
@pytest.mark.parametrize("freeze", ["kv", "attention"])
def test_a_folder_is_read_as_what_was_written(freeze: str, words: dict[str, int], toy: Taken, tmp_path: Path) -> None:
    one = concept(toy, tmp_path, words, chosen(SD15, freeze))
    again = take(written(toy, one, tmp_path / "out"))
    assert (again.artifact.kind, again.artifact.family) == ("custom", "sd15")
    assert again.artifact.facts == one.artifact.facts
    assert again.artifact.digest == one.artifact.digest


def test_the_file_of_a_word_is_one_that_diffusers_finds_by_itself(toy: Taken, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    one = concept(toy, tmp_path, {"<toy>": 2})
    folder = written(toy, one, tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {MATRICES, "learned_embeds.safetensors"}
    diffusers = export(tmp_path / "base", toy, ["diffusers"], {}) / "diffusers"
    pipeline = StableDiffusionPipeline.from_pretrained(diffusers, torch_dtype=torch.float32)
    pipeline.load_textual_inversion(str(folder))
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[-2:], one.tensors("embedding")["text_encoder"])


def test_matrices_alone_and_a_word_under_its_own_name_are_read(toy: Taken, tmp_path: Path) -> None:
    one = concept(toy, tmp_path, {"<toy>": 1})
    folder = written(toy, one, tmp_path / "out")
    alone = take(folder / MATRICES)
    assert alone.artifact.facts == {}
    assert set(alone.tables) == {"custom"}
    (folder / "learned_embeds.safetensors").rename(folder / "<toy>.safetensors")
    rows = load_file(folder / "<toy>.safetensors")
    save_file({"<toy>": rows["<toy>"][0].clone()}, folder / "<toy>.safetensors")  # as one row, without its count
    named = take(folder)
    assert named.artifact.facts == {"token": "<toy>"}
    assert named.artifact.digest == one.artifact.digest


def test_what_is_no_custom_diffusion_is_refused(toy: Taken, tmp_path: Path) -> None:
    folder = written(toy, concept(toy, tmp_path, {"<toy>": 1}), tmp_path / "out")
    whole = load_file(folder / MATRICES)
    for name, sentence in (("x.weight", "no part of Custom Diffusion"), (raw_name("nowhere.to_k.weight"), "no family")):
        save_file(whole | {name: torch.zeros(2)}, folder / MATRICES)
        with pytest.raises(UsageError, match=sentence):
            take(folder)
    save_file(whole, folder / MATRICES)
    save_file({"a": torch.zeros(1, 16), "b": torch.zeros(1, 16)}, folder / "learned_embeds.safetensors")
    with pytest.raises(UsageError, match="does not hold the rows of one word"):
        take(folder)
    save_file({"a": torch.zeros(1, 16)}, folder / "learned_embeds.safetensors")
    save_file({"b": torch.zeros(1, 16)}, folder / "learned_embeds_2.safetensors")
    with pytest.raises(UsageError, match="different words for its text encoders: a and b"):
        take(folder)
