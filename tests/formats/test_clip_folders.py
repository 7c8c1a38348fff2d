"""A folder of transformers' CLIP: vision model and projections are read, the text model is not needed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdforge.errors import UsageError
from sdforge.formats.clip_folder import NEUTRAL, fact
from sdforge.formats.layout import read_layout
from sdforge.order import Given
from sdforge.trainings.aesthetic_gradient.adapter import mean_embedding
from tests.families.workbench import Taken, change_json, same_bytes, take
from tests.trainings.clips import write_clip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(toys: Path) -> Path:
    return write_clip(toys / "clip")


@pytest.fixture(scope="module")
def clip(folder: Path) -> Taken:
    return take(folder)


def test_a_clip_is_a_vision_model_and_a_projection_of_texts(clip: Taken, folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    assert clip.artifact.kind == "clip"
    assert set(clip.tables) == {"image_encoder", "text_projection"}
    assert same_bytes(clip.tensors("text_projection")["weight"], stored["text_projection.weight"])
    vision = clip.tensors("image_encoder")
    assert set(vision) == {name for name in stored if name.startswith(("vision_model", "visual")) and "ids" not in name}
    assert all(same_bytes(tensor, stored[name]) for name, tensor in vision.items())


def test_how_pictures_are_prepared_is_a_fact(clip: Taken) -> None:
    assert clip.artifact.facts == {
        "size": 32,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "heads": 2,
        "text_layers": 2,
    }
    assert fact(clip.artifact.facts, "activation") == "quick_gelu"
    assert fact({}, "size") == NEUTRAL["size"] == 224


def test_the_text_model_is_read_over_and_said_so(folder: Path) -> None:
    passed = read_layout(folder).passed
    assert passed["the text model: a checkpoint's own is used"] > 30


def test_it_fits_text_encoders_of_its_width(folder: Path) -> None:
    assert read_layout(folder).notes["widths"] == {"text": 16}


def test_it_sees_what_transformers_sees(clip: Taken, folder: Path, drawings: Path, pictures: Given) -> None:
    """Squares are cut from the middle and scaled bicubically; torch and Pillow round a little differently."""
    from transformers import CLIPImageProcessor, CLIPModel

    processor, model = CLIPImageProcessor.from_pretrained(folder), CLIPModel.from_pretrained(folder)
    images = [Image.open(path).convert("RGB") for path in sorted(drawings.glob("*.png"))]
    with torch.no_grad():
        seen = model.get_image_features(**processor(images, return_tensors="pt"))
        features = getattr(seen, "pooler_output", seen)
    theirs = torch.nn.functional.normalize(features).mean(0)
    assert torch.allclose(mean_embedding(clip.given(), pictures, CPU), theirs, atol=2e-3)


def test_a_tensor_that_no_clip_has_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "clip"))
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors | {"extra": torch.zeros(1)}, copy / "model.safetensors")
    with pytest.raises(UsageError, match="holds extra"):
        read_layout(copy)
    flat = tensors | {"text_projection.weight": torch.zeros(16)}
    save_file(flat, copy / "model.safetensors")
    with pytest.raises(UsageError, match=r"text_projection\.weight of shape \[16\], which no text projection has"):
        read_layout(copy)
    for name in ("text_projection.weight", "vision_model.encoder.layers.1.mlp.fc2.bias"):
        save_file({n: tensor for n, tensor in tensors.items() if n != name}, copy / "model.safetensors")
        with pytest.raises(UsageError, match=f"lacks 1 tensor of a CLIP: {re.escape(name)}"):
            read_layout(copy)


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("preprocessor_config.json", {"image_mean": [0.5]}, "states image_mean as"),
        ("config.json", {"vision_config": {"image_size": "big"}}, "states image_size as 'big'"),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5, 0]}, "states image_std as"),
        ("config.json", {"text_config": 12}, "states no sound vision_config and text_config"),
        ("config.json", {"vision_config": {"hidden_act": ["gelu"]}}, "states hidden_act as"),
    ],
)
def test_what_cannot_be_is_refused(
    file: str, change: dict[str, object], sentence: str, folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "clip"))
    change_json(copy / file, change)
    with pytest.raises(UsageError, match=sentence):
        read_layout(copy)
