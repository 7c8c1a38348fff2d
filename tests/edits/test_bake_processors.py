"""Class A: a bake gives the committed bytes on processors with narrower vectors, with one thread and with two.

`python -m tests.edits.test_bake_processors` prints the table of `vectors.json` as this process computes it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.edits.test_bake import VECTORS, baked_vector
from tests.edits.test_bake_forms import OWN, vector
from tests.families.workbench import digest

# torch's and MKL's names of what a processor can do
NARROWER = {"default": "SSE4_2", "avx2": "AVX2"}


@pytest.mark.parametrize("capability", NARROWER)
def test_another_processor_bakes_the_same_bytes(capability: str) -> None:
    """With its own widest vectors it is tried by the tests that read `vectors.json`."""
    widest = torch.backends.cpu.get_cpu_capability()
    if capability == "avx2" and widest not in ("AVX2", "AVX512"):
        pytest.skip(f"this processor computes with {widest}")
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "MKL_ENABLE_INSTRUCTIONS": NARROWER[capability]}
    command = [sys.executable, "-m", "tests.edits.test_bake_processors"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found, expected = json.loads(done.stdout), json.loads(VECTORS.read_text())
    assert found["capability"] == capability
    for threads in ("1", "2"):
        assert found[threads] == {name: expected[name] for name in ("bake", "forms")}, threads


if __name__ == "__main__":
    table: dict[str, object] = {"capability": torch.backends.cpu.get_cpu_capability().lower()}
    for count in (1, 2):
        torch.set_num_threads(count)
        table[str(count)] = {
            "bake": {dtype: digest(baked_vector(dtype)) for dtype in ("fp16", "bf16", "fp32")},
            "forms": {f"{name}, {dtype}": vector(name, dtype) for name in OWN for dtype in ("fp16", "fp32")},
        }
    print(json.dumps(table))
