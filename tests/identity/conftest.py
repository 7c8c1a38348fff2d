"""What names are pinned to: committed vectors, and a world whose artifacts have fixed names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdforge.artifact import Artifact, Component
from tests.planner.conftest import World

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def vectors() -> dict[str, Any]:
    """Values with the names that they had in the first release."""
    found: dict[str, Any] = json.loads((HERE / "vectors.json").read_text(encoding="utf-8"))
    return found


def fixed_world(root: Path) -> World:
    """Artifacts of every kind that a method takes, whose identities are mere digits."""
    world = World(root)
    parts = ("unet", "text_encoder", "vae", "tokenizer")
    for name, digit in (("flat", "1"), ("ink", "2")):
        names = {part: (digit + str(i)) * 32 for i, part in enumerate(parts)}
        components = {part: Component(text, text, "", "F16") for part, text in names.items()}
        facts: dict[str, Any] = {"prediction": "v_prediction"} if name == "ink" else {}
        world.artifacts[name] = Artifact("checkpoint", "sd15", components, facts)
    for name, kind, digit in (("glow", "lora", "3"), ("word", "embedding", "4")):
        component = Component(digit * 64, digit * 64, "", "F16")
        facts = {"token": "<word>"} if kind == "embedding" else {"alpha": 4.0}
        world.artifacts[name] = Artifact(kind, "sd15", {kind: component}, facts)
    others: tuple[tuple[str, str, str, str, tuple[str, ...], dict[str, Any]], ...] = (
        ("look", "custom", "sd15", "7", ("custom",), {"token": "<look>"}),
        ("look2", "custom", "sd15", "9", ("custom",), {"token": "<look2>"}),
        ("clip", "clip", "", "8", ("text_encoder", "image_encoder", "tokenizer"), {}),
        ("seen", "checkpoint", "unclip", "a", (*parts, "image_encoder", "image_normalizer"), {}),
        ("view", "image_embedding", "unclip", "b", ("image_embedding",), {}),
        ("mood", "aesthetic", "sd15", "c", ("aesthetic",), {}),
    )
    for name, kind, family, digit, own, facts in others:
        names = {part: (digit + str(i)) * 32 for i, part in enumerate(own)}
        components = {part: Component(text, text, "", "F16") for part, text in names.items()}
        world.artifacts[name] = Artifact(kind, family, components, facts)
    world.artifacts["learned"] = Artifact("delta", "sd15", {"unet": Component("6" * 64, "6" * 64, "", "F16")})
    world.artifacts["pictures"] = Artifact("dataset", whole="5" * 64, notes={"rows": [], "names": {}, "without": []})
    world.artifacts["photo"] = Artifact("picture", whole="6" * 64)
    world.tables |= {name: {"from": name} for name, artifact in world.artifacts.items() if artifact.kind != "dataset"}
    return world
