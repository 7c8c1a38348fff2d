"""Golden vectors: small class-A computations whose bytes are known. `python -m sdforge.run.golden` looks at them here.

Whoever gets other bytes has a processor, a library or a build of torch with which class A (README, "What is promised")
does not hold. Beside them stands what this process sees of devices.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdforge.edits import bake
from sdforge.exact import root
from sdforge.merges.add_difference import add_difference
from sdforge.merges.dare import dare
from sdforge.merges.slerp import slerp
from sdforge.merges.ties import ties
from sdforge.merges.weighted_sum import weighted_sum
from sdforge.run.fused import without
from sdforge.run.tensors import raw, rounded
from sdforge.selection import why_not

SHAPE = (384, 320)  # more than one block of 65,536


def wave(step: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Return fp32 numbers from −8 to 8, exactly the same everywhere: multiples of 2⁻¹² from a linear congruence."""
    count = torch.Size(shape).numel()
    whole = (torch.arange(count, dtype=torch.int64) * step) % 65_521 - 32_760
    return (whole.float() / 4096).reshape(shape)


def _baked() -> Tensor:
    factors = [wave(40_503, (SHAPE[0], 64)), wave(12_289, (64, SHAPE[1]))]
    return bake.compute({"scales": [0.7]}, [wave(31_337), *factors], torch.float16)


VECTORS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "weighted_sum": (
        lambda: weighted_sum(*map(wave, (7_919, 104_729, 31_337)), weights=[0.6, 0.3, 0.1]),
        "47215c76455decff877d139a472e1667c6b6b1d195cf3e3780ce87b5a3d64e02",
    ),
    "add_difference": (
        lambda: add_difference(*map(wave, (7_919, 104_729, 31_337)), weight=0.7),
        "4a092684e13a814efabb377d6e092e9826c00dc87fb35f4fc4535e0262019758",
    ),
    "slerp": (
        lambda: slerp(wave(7_919), wave(104_729), weight=0.3),
        "72fea630112461a42d3e1620c5e45491628ce8b966dc42c3b1954548bda5109f",
    ),
    "ties": (
        lambda: ties(*map(wave, (7_919, 104_729, 31_337)), weights=[0.7, 0.4], density=0.3),
        "ecaff38e06d2f8feea167acc1a7600a3acb2e3c67750612099da6b92cf46f334",
    ),
    "dare": (
        lambda: dare(*map(wave, (7_919, 104_729)), weights=[0.7], density=0.3, seed=7, tensor="unet.x"),
        "20b9d08626aac600bf5b121c27f59c26c0ef1c9bad133486e049b57e124a68fd",
    ),
    "bake": (
        _baked,
        "fe275cf1a1e990407de75ad736002a5241e576aa2f2efe13fc054e2ae54145ee",
    ),
    "root": (
        lambda: root(wave(7_919).abs()),
        "d05eb4d1ef71c4889e8fa61302937d069f142f4846c3fe7866394efc28b1355b",
    ),
}


def digest(name: str) -> str:
    """Return the sha256 of a vector's bytes, computed here and rounded to fp16."""
    with torch.inference_mode():
        return hashlib.sha256(raw(rounded(name, VECTORS[name][0](), torch.float16))).hexdigest()


def look() -> dict[str, Any]:
    """Return what this process computes and sees.

    differing: the vectors that are not what they must be; unfit: the GPUs by which merges are not sorted, and why.
    """
    began = time.perf_counter()
    differing = [name for name, (_, expected) in VECTORS.items() if digest(name) != expected]
    found: dict[str, Any] = {
        "differing": differing,
        "vectors": len(VECTORS),
        "seconds": round(time.perf_counter() - began, 3),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "kernel": without(),
        "built_for": torch.version.cuda or "",
        "gpus": [],
        "unfit": {},
    }
    if torch.version.cuda and torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            found["gpus"].append([f"cuda:{i}", properties.name, properties.total_memory])
            if why := why_not(f"cuda:{i}"):
                found["unfit"][f"cuda:{i}"] = why
    return found


if __name__ == "__main__":
    print(json.dumps({name: digest(name) for name in VECTORS} if "--anew" in sys.argv else look()))
