"""An aesthetic from twelve drawings to a picture: trained, exported beside a preset, drawn with by who loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdforge import load_preset
from tests.conftest import new_project
from tests.families.workbench import write_toy
from tests.trainings.clips import write_clip

RECIPE = """\
family = "sd15"

[source.clip]
from = "clip"

[aesthetic_gradient.mood]
on = "base"
dataset = "drawings"
clip = "clip"
prompts = ["a cat"]
steps = 3
learning_rate = 0.1

[preset]
checkpoint = "base"
sidecars = ["mood"]
export = ["diffusers"]

[preset.previews]
prompts = ["a red house"]
seeds = [1]
steps = 2
guidance = 3.0
"""


def pixels(picture: Any) -> Any:
    return np.asarray(picture).astype(int)


def test_a_prompt_is_steered_in_the_previews_and_in_the_pipeline_alike(tmp_path: Path) -> None:
    project = new_project(tmp_path / "project", write_toy(tmp_path / "toy", 0), RECIPE)
    write_clip(project.root / "clip")
    project.build()
    out = project.root / "out" / "toy"
    assert [path.name for path in (out / "sidecars").iterdir()] == ["mood.safetensors"]
    with_it, without = (pixels(Image.open(out / "previews" / f"1-1-toy{end}.png")) for end in ("", "-without"))
    assert np.abs(with_it - without).max() > 2
    pipeline: Any = load_preset(out)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("a red house", generator=torch.Generator().manual_seed(1)).images[0]
    assert np.abs(pixels(drawn) - with_it).max() <= 2
