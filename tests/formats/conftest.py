"""The toy checkpoints of the families' tests, the toy as sdforge exports it, and a LoRA for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdforge.edits.export import run
from sdforge.order import Given, Order
from tests.families.conftest import each, other, toy, toys
from tests.families.workbench import Taken
from tests.run.conftest import drawings, pictures

__all__ = ["drawings", "each", "other", "pictures", "toy", "toys"]

Export = Callable[..., Path]


def export(work: Path, checkpoint: Taken, forms: list[str], settings: dict[str, Any], **more: list[Given]) -> Path:
    """Write a checkpoint (and LoRAs, embeddings) as `forge build` does; return the folder."""
    work.mkdir(parents=True, exist_ok=True)
    plain = {"title": "", "description": "", "licence": "", "trigger": [], "negative_prompt": "", "clip_skip": 0}
    inputs = {"checkpoint": [checkpoint.given()], **more}
    order = Order(
        "", "", "export", "edits", checkpoint.artifact.family, plain | settings | {"forms": forms}, str(work), inputs
    )
    run(order, lambda **_: None)
    return work


@pytest.fixture(scope="session")
def exported(toy: Taken, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy as a folder `diffusers` and a file `checkpoint.safetensors`."""
    return export(tmp_path_factory.mktemp("exported"), toy, ["checkpoint", "diffusers"], {})
