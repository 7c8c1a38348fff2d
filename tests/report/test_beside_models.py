"""What other programs read beside a model."""

from __future__ import annotations

import json
from typing import Any

from sdforge.report.beside import beside

SETTINGS = {"title": "toy", "description": "", "licence": "MIT", "trigger": ["toyword"], "clip_skip": 1}
SETTINGS |= {"negative_prompt": "blurry"}
SAMPLER = {"name": "DPM++ 2M", "steps": 20, "guidance": 7.0, "resolution": 512}


def read(*files: dict[str, Any], family: str = "sdxl") -> dict[str, Any]:
    """Return path → what is written there, for a preset with these files."""
    preset = {"preset": "toy", "family": family, "sampler": SAMPLER, "files": list(files)}
    return {each.path: json.loads(each.data) for each in beside(preset, SETTINGS, None)}


def test_a_checkpoint_says_its_words_version_and_advice() -> None:
    found = read({"path": "toy.safetensors", "kind": "checkpoint"})
    assert found == {
        "toy.json": {
            "description": "toy, checkpoint",
            "sd version": "SDXL",
            "activation text": "toyword",
            "preferred weight": 0.0,
            "negative text": "blurry",
            "notes": "sampler DPM++ 2M, steps 20, CFG 7, clip skip 2, licence MIT. "
            "Made by sdforge from the recipe toy.",
        }
    }


def test_a_lora_says_its_own_words_and_the_strength_that_the_preset_has_it_at() -> None:
    row = {"path": "loras/style.safetensors", "kind": "lora", "name": "style", "strength": 0.8}
    (found,) = read(row | {"trigger": ["ink"]}).values()
    assert (found["activation text"], found["preferred weight"], found["negative text"]) == ("ink", 0.8, "")


def test_an_embedding_is_called_by_its_file_and_a_negative_one_is_no_activation() -> None:
    word = {"path": "embeddings/word.safetensors", "kind": "embedding", "trigger": ["<w>"], "negative": []}
    bad = {"path": "embeddings/bad.safetensors", "kind": "embedding", "trigger": [], "negative": ["<bad>"]}
    found = read(word, bad)
    assert found["embeddings/word.json"]["activation text"] == "word"
    assert found["embeddings/bad.json"]["activation text"] == ""
    assert found["embeddings/bad.json"]["negative text"] == "bad"


def test_what_those_programs_do_not_list_has_nothing_beside_it() -> None:
    files = [
        {"path": "diffusers/unet/config.json", "kind": "diffusers"},
        {"path": "loras/style.diffusers.safetensors", "kind": "lora"},
        {"path": "embeddings/ink.diffusers_2.safetensors", "kind": "embedding"},
        {"path": "preset.safetensors", "kind": "checkpoint"},  # whose JSON would be the preset's description
    ]
    assert read(*files) == {}


def test_two_forms_of_one_model_share_what_lies_beside_them() -> None:
    forms = [
        {"path": f"embeddings/word.{end}", "kind": "embedding", "trigger": ["<w>"]} for end in ("pt", "safetensors")
    ]
    assert list(read(*forms)) == ["embeddings/word.json"]


def test_a_family_that_a1111_has_no_word_for_is_unknown() -> None:
    (found,) = read({"path": "toy.safetensors", "kind": "checkpoint"}, family="unclip").values()
    assert found["sd version"] == "Unknown"
