"""Locks with a few entries."""

from __future__ import annotations

from typing import Any

import pytest

from sdforge.lock import Lock, Pin


def a_pin(key: str = "a", digest: str = "1", **fields: Any) -> Pin:
    """A pinned LoRA; key and digest are a digit each, repeated."""
    given: dict[str, Any] = {
        "plans": ["f" * 64],
        "kind": "lora",
        "family": "sd15",
        "method": "lora",
        "components": {"lora": "2" * 64},
        "facts": {"alpha": 4.0, "tokens": [["<x>", 2]]},
        "settings": {"steps": 10, "learning_rate": 1e-4, "flip": False, "token": '<"ü\\\n\x7f>'},
        "inputs": {"on": {"components": {"unet": "3" * 64}}, "dataset": "4" * 64},
        "fingerprint": {"device": "cpu", "threads": 1},
        "sketch": "AAAA",
        "norm": 1.5,
    }
    return Pin(key * 64, digest * 64, **(given | fields))


@pytest.fixture
def lock() -> Lock:
    """Two sources, two targets of one recipe, one of another, and a pin."""
    found = Lock(
        sources={
            "flat": {"digest": "5" * 64, "files": {"unet/model.safetensors": "6" * 64}, "size": 12},
            "sketches": {"digest": "7" * 64},
        },
        targets={
            "r:soft": {"key": "8" * 64, "digest": "9" * 64},
            "r:preset.export": {"key": "b" * 64},
            "other:soft": {"key": "8" * 64, "digest": "9" * 64},
        },
    )
    found.pin(a_pin(), replace=True)
    return found
