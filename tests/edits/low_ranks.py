"""Orders of `resize` and `extract`, run as the worker runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdforge.edits import extract, resize
from sdforge.order import Order, Outcome
from sdforge.ref import Ref
from sdforge.run.tensors import load
from tests.families.workbench import Taken, keep

RANKS = {"dtype": "fp32", "rank": 0, "conv_rank": None, "energy": 1.0, "threshold": 0.0, "relative_threshold": 0.0}


def resized(work: Path, lora: Taken, **settings: Any) -> Taken:
    """Resize a LoRA, in fp32 and to any rank unless the settings say otherwise."""
    return _kept(work, resize.run(order_to_resize(work, lora, **settings), lambda **_: None, lambda: False))[0]


def extracted(work: Path, tuned: Taken, base: Taken, **settings: Any) -> tuple[Taken, dict[str, Any]]:
    """Extract a LoRA, in fp32 and of any rank unless the settings say otherwise; return it and the record."""
    order = order_to_extract(work, tuned, base, **settings)
    return _kept(work, extract.run(order, lambda **_: None, lambda: False))


def order_to_resize(work: Path, lora: Taken, **settings: Any) -> Order:
    """Return the order that `resized` runs."""
    work.mkdir(parents=True, exist_ok=True)
    return Order("", "", "resize", "edits", "sd15", RANKS | settings, str(work), {"lora": [lora.given()]})


def order_to_extract(work: Path, tuned: Taken, base: Taken, **settings: Any) -> Order:
    """Return the order that `extracted` runs."""
    work.mkdir(parents=True, exist_ok=True)
    stated = RANKS | {"components": [], "biases": False} | settings
    inputs = {"tuned": [tuned.given()], "base": [base.given()]}
    return Order("", "", "extract", "edits", tuned.artifact.family, stated, str(work), inputs)


def _kept(work: Path, outcome: Outcome) -> tuple[Taken, dict[str, Any]]:
    rows = outcome.components["lora"]
    path = str(work / outcome.pack)
    tensors = {row[0]: load(Ref(row[0], row[1], tuple(row[2]), path, row[5], row[4])) for row in rows}
    taken = keep(work / "kept", {"lora": tensors}, kind="lora", facts=outcome.facts)
    assert outcome.grade == "B"
    assert outcome.fingerprint["torch"]
    return taken, outcome.record
