"""What is exported of every family and loaded again draws what our own sampler draws."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sdforge import load_preset, sampler
from sdforge.edits.export import run
from sdforge.edits.insert import ROWS
from sdforge.errors import UsageError
from sdforge.families import family
from sdforge.formats.own import own_metadata
from sdforge.formats.tokenizer import tokenizer_files
from sdforge.order import Order
from sdforge.run.sample import Wish, sample
from tests.families.toys import write_family
from tests.families.workbench import Taken, keep, take

WISH = Wish("a red cat", "house", seed=1, steps=2, guidance=3.0, resolution=64, clip_skip=1)


def wish(name: str) -> Wish:
    """What is asked of a family: nothing in words where it understands none."""
    found = WISH._replace(clip_skip=0) if family(name).image_embeddings else WISH
    return found if family(name).text_encoders else found._replace(prompt="", negative_prompt="")


SETTINGS: dict[str, Any] = {
    "forms": ["checkpoint", "diffusers"],
    "title": "Toy",
    "description": "",
    "licence": "",
    "trigger": [],
    "negative_prompt": "",
    "clip_skip": 0,
}


@pytest.fixture
def folder(each: Taken, tmp_path: Path) -> Path:
    """A preset of the family's toy."""
    name = each.artifact.family
    inputs = {"checkpoint": [each.given()]}
    run(Order("", "", "export", "edits", name, SETTINGS, str(tmp_path), inputs), lambda **_: None)
    (tmp_path / "checkpoint.safetensors").rename(tmp_path / "toy.safetensors")
    advice = {"settings": sampler.SETTINGS, "steps": WISH.steps, "guidance": WISH.guidance, "resolution": 64}
    described = {"v": 2, "preset": "toy", "family": name, "words": [], "files": []}
    described |= {"sidecars": [], "sampler": advice}
    described |= {"negative_prompt": wish(name).negative_prompt, "clip_skip": wish(name).clip_skip}
    if family(name).image_embeddings:
        show(each, tmp_path)
        described["sidecars"] = [{"name": "look", "kind": "image_embedding", "path": "look.safetensors"}]
    (tmp_path / "preset.json").write_text(json.dumps(described))
    return tmp_path


def show(each: Taken, folder: Path) -> None:
    """Write an image embedding that the toy can be shown."""
    from safetensors.torch import save_file

    shapes = {t.name: t.shape for t in each.tables["image_encoder"]}
    width = shapes["visual_projection.weight"][0]
    tensors = {"image_embeds": torch.randn(1, width, generator=torch.Generator().manual_seed(2))}
    save_file(tensors, folder / "look.safetensors", own_metadata("image_embedding", each.artifact.family, {}))


def loaded(each: Taken) -> Any:
    load = importlib.import_module(f"sdforge.families.{each.artifact.family}.load").load
    return load(each.given(), torch.device("cpu"), torch.float32)


def test_a_loaded_preset_draws_what_our_sampler_draws(each: Taken, folder: Path) -> None:
    diffusion, of = loaded(each), family(each.artifact.family)
    if of.image_embeddings:
        from safetensors.torch import load_file

        from sdforge.sidecars.image_embedding import attach

        attach(diffusion, load_file(folder / "look.safetensors"), {})
    (expected_CHW,) = sample(diffusion, [wish(of.name)])
    expected = ((expected_CHW.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    for form in ("diffusers", "checkpoint"):
        if form == "checkpoint" and of.image_embeddings:
            with pytest.raises(UsageError, match="opens no single file"):
                load_preset(folder, form="checkpoint")
            continue
        pipeline: Any = load_preset(folder, form=form)  # type: ignore[arg-type]
        pipeline.set_progress_bar_config(disable=True)
        said = {"prompt": WISH.prompt} if of.text_encoders else {}
        (found,) = pipeline(**said, generator=torch.Generator().manual_seed(1), output_type="np").images
        assert np.abs(found * 255 - expected).max() <= 2, form


@pytest.mark.parametrize(
    ("form", "written"), [("custom", "*/learned_embeds.safetensors"), ("custom-embeddings", "*.safetensors")]
)
def test_a_word_of_custom_diffusion_finds_its_rows_beside_a_single_file(
    form: str, written: str, toys: Path, tmp_path: Path
) -> None:
    """diffusers writes the rows of each text encoder into a file of their own, web UIs read one of both."""
    large = take(write_family(toys / "sdxl", "sdxl"))
    widths = {name: large.tensors(name)[ROWS].shape[1] for name in family("sdxl").text_encoders}
    rows = {name: torch.full((2, width), float(i + 1)) for i, (name, width) in enumerate(widths.items())}
    matrix = {f"unet.{name}": large.tensors("unet")[name] for name in family("sdxl").cross_attention[:1]}
    custom = keep(tmp_path / "c", {"custom": matrix, "embedding": rows}, kind="custom", facts={"token": "<toy>"})
    inputs = {"checkpoint": [large.given()], "custom": [custom.given()]}
    settings = SETTINGS | {"forms": ["checkpoint", form]}
    run(Order("", "", "export", "edits", "sdxl", settings, str(tmp_path), inputs), lambda **_: None)
    (tmp_path / "checkpoint.safetensors").rename(tmp_path / "toy.safetensors")
    (tmp_path / "tokenizer").mkdir()
    for name, text in tokenizer_files(large.vocabulary, [], "!").items():
        (tmp_path / "tokenizer" / name).write_text(text)
    (file,) = tmp_path.glob(f"custom/{written}")
    assert form == "custom" or set(load_file(file)) == {"clip_l", "clip_g"}
    word = {"word": "<toy>", "vectors": 2, "negative": False, "file": str(file.relative_to(tmp_path))}
    described = {"v": 2, "preset": "toy", "family": "sdxl", "words": [word], "sidecars": [], "sampler": {}, "files": []}
    described |= {"negative_prompt": "", "clip_skip": 0}
    (tmp_path / "preset.json").write_text(json.dumps(described))
    pipeline: Any = load_preset(tmp_path, form="checkpoint")
    for name, expected in rows.items():
        table = getattr(pipeline, name).get_input_embeddings().weight
        assert torch.equal(table[-2:].float(), expected)
    assert len(pipeline.tokenizer) == len(pipeline.tokenizer_2) == table.shape[0]
