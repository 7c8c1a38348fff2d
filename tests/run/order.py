"""Orders for trainings on a toy, as `forge build` hands them to the worker."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdforge.dtypes import ITEM_SIZE
from sdforge.formats.safetensors import read_header
from sdforge.method import method
from sdforge.order import Given, Order, Outcome
from sdforge.run.train import run_training
from sdforge.settings import Seeded, takes
from sdforge.store.files import sha256_of
from tests.families.workbench import Taken

SEED = 3


def dataset(folder: Path, *, held_out: int = 0, repeats: int = 1, trigger: str = "<toy>") -> Given:
    """Return a folder of pictures with captions as the builder hands it over."""
    rows = [
        [str(p), sha256_of(p), p.with_suffix(".txt").read_text().strip().replace("{trigger}", trigger), repeats]
        for p in sorted(folder.glob("*.png"))
    ]
    return Given("dataset", "drawings", pictures=sorted(rows, key=lambda row: row[1:]), held_out=held_out)


def settings(name: str, **changes: Any) -> dict[str, Any]:
    """The settings of a training as its manifest has them."""
    fixed: dict[str, Any] = {
        "on": "base",
        "dataset": "drawings",
        "precision": "fp32",
        "batch": 2,
        "steps": 6,
        "warmup": 0,
        "token": "<toy>",
        "image": "drawing",
        "prompt": "a <toy> cat" if name == "dreambooth" else "a red cat",
        "clip": "clip",
        "prompts": ["a red cat"],
    }
    if name == "custom_diffusion":  # the toys do not know the rare word that it starts from
        fixed["init"] = "cat"
    table = method(name).table
    fields = table.model_fields
    own = {key: value for key, value in fixed.items() if key in fields and (key != "clip" or takes(fields[key]))}
    seed = {"seed": changes.pop("seed", SEED)} if issubclass(table, Seeded) else {}
    return table.model_validate(own | changes).settings() | seed


def shown(name: str) -> bool:
    """Say whether a training wants a checkpoint that is shown pictures."""
    return "image_encoder" in method(name).signature.roles["on"].reads


def order(work: Path, name: str, on: Taken, pictures: Given, **changes: Any) -> Order:
    work.mkdir(parents=True, exist_ok=True)
    how, prior = changes.pop("how", {}), changes.pop("prior", None)
    return Order(
        key="",
        target="toy",
        method=name,
        group="trainings",
        family=on.artifact.family,
        settings=settings(name, **changes),
        work=str(work),
        inputs={"on": [on.given()], "dataset": [pictures], **({"prior": [prior]} if prior else {})},
        states=str(work / "states"),
        derived=str(work / "derived"),
        how={"device": "cpu", "threads": 1, **how},
    )


def train(order: Order, stopped: Callable[[], bool] = lambda: False) -> Outcome:
    return run_training(order, lambda **_: None, stopped)


def state_size(folder: Path) -> int:
    """The bytes of the numbers of the one state that is there; what only counts steps has no shape."""
    (state,) = folder.glob("*.safetensors")
    entries = read_header(state).tensors.values()
    return sum(math.prod(entry.shape) * ITEM_SIZE[entry.dtype] for entry in entries if entry.shape)
