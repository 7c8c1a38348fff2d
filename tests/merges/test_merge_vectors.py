"""Class A: merges give the bytes of the committed table, and those that numpy computes with the same arithmetic.

The table is `vectors.json`: method → dtype → sha256 of the result. A change of it is a change of every merge that was
ever made: raise the method's VERSION. `python -m tests.merges.test_merge_vectors` prints it anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch

from sdforge.method import method_groups
from sdforge.order import Computation
from sdforge.run.formula import compute
from tests.families.workbench import Taken, digest, keep, reference

TABLE = Path(__file__).parent / "vectors.json"
SHAPE = (257, 300)  # more than one block of 65,536
DTYPES = {"fp16": (torch.float16, "F16"), "bf16": (torch.bfloat16, "BF16"), "fp32": (torch.float32, "F32")}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "weighted_sum": (3, {"weights": [0.6, 0.3, 0.1]}),
    "weighted_sum near": (2, {"weights": [0.7, 0.3]}),
    "weighted_sum far": (2, {"weights": [0.1, 0.9]}),
    "weighted_sum beyond": (2, {"weights": [1.3, 0.4]}),
    "add_difference": (3, {"weight": 0.7}),
    "slerp": (2, {"weight": 0.3, "parallel": 0.9995}),
}
Array: TypeAlias = Any  # numpy's, of fp32 or fp64


def numbers(dtype: str, seed: int) -> torch.Tensor:
    """Numbers of random sign, mantissa and exponent, some of them denormal, of at most 2."""
    draw = np.random.RandomState(seed)  # its integers are the same in every version of numpy
    if dtype == "fp32":
        wide = draw.randint(0, 2**32, SHAPE, dtype=np.uint32)
        return torch.from_numpy(((wide & 0x807FFFFF) | (((wide >> 23) % 24 + 104) << 23)).view(np.float32))
    bits = draw.randint(0, 2**16, SHAPE, dtype=np.uint16)
    if dtype == "fp16":
        exponent = (bits >> 10) % 16
        return torch.from_numpy(((bits & 0x83FF) | (exponent << 10)).view(np.float16))
    exponent = (bits >> 7) % 24 + 104
    return torch.from_numpy(((bits & 0x807F) | (exponent << 7)).view(np.int16)).view(torch.bfloat16)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Taken]:
    work = tmp_path_factory.mktemp("vectors")
    return write_inputs(work)


def write_inputs(work: Path) -> dict[str, Taken]:
    return {
        dtype: keep(work / dtype, {"unet": {str(seed): numbers(dtype, seed) for seed in (1, 2, 3)}}) for dtype in DTYPES
    }


def merged(case: str, dtype: str, taken: Taken) -> torch.Tensor:
    count, parameters = CASES[case]
    refs = tuple(reference(t, taken.files) for t in sorted(taken.tables["unet"]))[:count]
    return compute(Computation("unet", "x", DTYPES[dtype][1], SHAPE, case.split()[0], parameters, refs), "unet.x")


def test_vectors_are_of_merges_in_the_folder() -> None:
    assert {case.split()[0] for case in CASES} <= {n for n, group in method_groups().items() if group == "merges"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_merge_gives_the_committed_bytes(case: str, dtype: str, inputs: dict[str, Taken]) -> None:
    assert digest(merged(case, dtype, inputs[dtype])) == json.loads(TABLE.read_text())[case][dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_numpy_computes_the_same_bytes(case: str, dtype: str, inputs: dict[str, Taken]) -> None:
    count, parameters = CASES[case]
    working = np.float64 if dtype == "fp32" else np.float32
    taken = [tensor.double().numpy().astype(working) for tensor in inputs[dtype].tensors("unet").values()][:count]
    result = NUMPY[case.split()[0]](taken, parameters, working)
    assert result.dtype == working
    rounded = torch.from_numpy(result.astype(np.float32)).to(DTYPES[dtype][0])
    assert torch.equal(rounded, merged(case, dtype, inputs[dtype]))


def np_weighted_sum(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    weights = parameters["weights"]
    if weights == [0.7, 0.3]:
        return m[0] + (m[1] - m[0]) * real(0.3)
    if weights == [0.1, 0.9]:
        return m[1] - (m[1] - m[0]) * real(0.1)
    total = m[0] * real(weights[0])
    for tensor, weight in zip(m[1:], weights[1:], strict=True):
        total = total + tensor * real(weight)
    return total


def np_add_difference(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    return m[0] + (m[1] - m[2]) * real(parameters["weight"])


def np_slerp(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    a, b = (tensor.astype(np.float64) for tensor in m)
    angle = math.acos(np_dot(a, b) / math.sqrt(np_dot(a, a)) / math.sqrt(np_dot(b, b)))
    t = parameters["weight"]
    return m[0] * real(math.sin((1 - t) * angle) / math.sin(angle)) + m[1] * real(math.sin(t * angle) / math.sin(angle))


def np_dot(a: Array, b: Array) -> float:
    """Blocks of 65,536 folded by halves, as the reference on merge methods (§0.3) writes it."""
    sums = []
    for start in range(0, a.size, 65_536):
        x = (a.ravel() * b.ravel())[start : start + 65_536]
        x = np.pad(x, (0, 65_536 - x.size))
        while x.size > 1:
            x = x[: x.size // 2] + x[x.size // 2 :]
        sums.append(float(x[0]))
    return math.fsum(sums)


NUMPY = {"weighted_sum": np_weighted_sum, "add_difference": np_add_difference, "slerp": np_slerp}


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        found = write_inputs(Path(folder))
        print(json.dumps({c: {d: digest(merged(c, d, found[d])) for d in DTYPES} for c in CASES}, indent=2))
