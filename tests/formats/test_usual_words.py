"""A lone single file says nothing of words: CLIP's own come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdforge.families import family, family_names
from sdforge.formats.tokenizer import END, START, USUAL, tokenizer_files, usual_words
from tests.families.toys import write_family
from tests.families.workbench import Taken, take
from tests.formats.conftest import export

WIDE_TABLES = ("token_embedding.weight",)


def test_words_have_the_numbers_that_every_program_gives_them(tmp_path: Path) -> None:
    """The numbers are CLIP's published ones: "a photo of a cat" and the marks around it."""
    from transformers import CLIPTokenizer

    words = usual_words()["vocab"]
    assert len(words) == USUAL
    assert [words[word] for word in (START, END, "!", "*</w>", "sks</w>")] == [49406, 49407, 0, 265, 48136]
    for name, text in tokenizer_files(usual_words(), []).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer("A photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.mark.parametrize("name", family_names())
def test_a_lone_file_of_each_family_is_all_that_is_needed(name: str, toys: Path, tmp_path: Path) -> None:
    """Its table of words is as long as real ones are, and it states nothing."""
    folder = write_family(toys / ("toy" if name == "sd15" else name), name)
    file = export(tmp_path / "file", take(folder), ["checkpoint"], {}) / "checkpoint.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if key.endswith(WIDE_TABLES)]:
        tensors[key] = torch.zeros(USUAL, tensors[key].shape[1], dtype=torch.float16)
    save_file(tensors, tmp_path / "lone.safetensors")
    lone = take(tmp_path / "lone.safetensors")
    assert lone.artifact.family == name
    assert lone.vocabulary == (usual_words() if family(name).text_encoders else {})
    _opens(lone, tmp_path)


def _opens(lone: Taken, work: Path) -> None:
    """What is made of it, a folder, is what diffusers opens without a network."""
    import diffusers

    lone.artifact.facts.update(_narrow(lone.artifact.family))
    folder = export(work / "folder", lone, ["diffusers"], {}) / "diffusers"
    pipeline: Any = getattr(diffusers, family(lone.artifact.family).pipeline)
    assert pipeline.from_pretrained(folder, local_files_only=True).unet.dtype is torch.float32


def _narrow(name: str) -> dict[str, Any]:
    """Facts of the toys that the tensors of a file do not show: heads and groups that fit their widths."""
    encoders = {f"text_heads{each.removeprefix('text_encoder')}": 2 for each in family(name).text_encoders}
    images = {"image_heads": 2} if family(name).image_embeddings else {}
    return {"unet_heads": 2, "unet_groups": 4, "vae_groups": 4, **encoders, **images}
