"""Class A: merges give the bytes of the committed table, and those that numpy computes with the same arithmetic.

The table is `vectors.json`: method → dtype → sha256 of the result. A change of it is a change of every merge that was
ever made: raise the method's VERSION. `python -m tests.merges.test_merge_vectors` prints it anew.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch

from sdforge.method import method_groups
from sdforge.order import Computation
from tests.families.workbench import Taken, computed, digest, keep, reference

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
    "linear": (3, {"weights": [3.0, 2.0, 2.0]}),
    "linear two": (2, {"weights": [1.0, 2.0]}),
    "task_arithmetic": (3, {"weights": [0.7, -0.2], "scale": 0.9, "normalize": True}),
    "ties": (3, {"weights": [0.7, 0.4], "density": 0.3, "vote": "sum", "scale": 0.9, "normalize": True}),
    "ties count": (4, {"weights": [0.7, 0.4, 0.3], "density": 0.9, "vote": "count", "scale": 1.0, "normalize": False}),
    "dare": (3, {"weights": [0.7, 0.4], "density": 0.3, "seed": 7, "tensor": "unet.x"}),
    "dare voted": (3, {"weights": [0.7, 0.4], "density": 0.8, "vote": "sum", "normalize": True, "tensor": "unet.x"}),
    "breadcrumbs": (3, {"weights": [0.7, 0.4], "density": 0.6, "gamma": 0.05}),
    "sum_twice": (3, {"alpha": 0.3, "beta": 0.6}),
    "scale": (1, {"weight": 0.7}),
    "train_difference": (3, {"weight": 0.7, "gain": 1.8}),
    "similarity_add_difference": (3, {"alpha": 0.7, "beta": 0.9}),
    "add_perpendicular": (3, {"weight": 0.7}),
    "model_stock": (4, {}),
    "model_stock filters": (3, {"filter_wise": True}),
    "cosine": (2, {"weight": 0.01}),
    "cosine mean": (2, {"weight": -0.3, "similarity": "mean"}),
    "tensor_sum": (2, {"width": 0.5, "offset": 0.7}),
    "clamp": (3, {"stiffness": 0.0}),
    "clamp stiff": (4, {"stiffness": 0.4}),
    "subtract": (2, {"weight": 0.7}),
    "add": (2, {"weight": -0.7}),
    "adjust": (1, {"detail_in": 3.0, "tensor": "unet.conv_in.bias"}),
    "nearswap": (2, {"t": 0.01}),
    "euclidean_add_difference": (3, {"weight": 0.3}),
    "extract_similar": (3, {"alpha": 0.3, "beta": 0.4, "gamma": 3}),
    "geometric_median": (4, {"max_iter": 20}),
    "karcher": (3, {"max_iter": 10, "tol": 1e-5}),
    "sce": (4, {"select_topk": 0.4}),
    "della": (3, {"weights": [0.7, 0.4], "density": 0.5, "epsilon": 0.2, "tensor": "unet.x"}),
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
        dtype: keep(work / dtype, {"unet": {str(seed): numbers(dtype, seed) for seed in (1, 2, 3, 4)}})
        for dtype in DTYPES
    }


def merged(case: str, dtype: str, taken: Taken) -> torch.Tensor:
    count, parameters = CASES[case]
    refs = tuple(reference(t, taken.files) for t in sorted(taken.tables["unet"]))[:count]
    return computed(Computation("unet", "x", DTYPES[dtype][1], SHAPE, case.split()[0], parameters, refs), "unet.x")


def test_every_merge_in_the_folder_has_vectors() -> None:
    merges = {n for n, group in method_groups().items() if group == "merges" and n != "halves"}
    assert {case.split()[0] for case in CASES} == merges


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_merge_gives_the_committed_bytes(case: str, dtype: str, inputs: dict[str, Taken]) -> None:
    assert digest(merged(case, dtype, inputs[dtype])) == json.loads(TABLE.read_text())[case][dtype]


@pytest.mark.parametrize(("capability", "threads"), [("default", 2), ("avx2", 1)])
def test_another_processor_gives_the_same_bytes(capability: str, threads: int) -> None:
    """This one's widest vectors are tried by the tests above; here it does without, and with two threads."""
    widest = torch.backends.cpu.get_cpu_capability()
    if capability == "avx2" and widest not in ("AVX2", "AVX512"):
        pytest.skip(f"this processor computes with {widest}")
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": str(threads)}
    env |= {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait for each other in turns are slow where others work too
    command = [sys.executable, "-m", "tests.merges.test_merge_vectors"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(TABLE.read_text())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_numpy_computes_the_same_bytes(case: str, dtype: str, inputs: dict[str, Taken]) -> None:
    count, parameters = CASES[case]
    working = np.float64 if dtype == "fp32" else np.float32
    taken = [tensor.double().numpy().astype(working) for tensor in inputs[dtype].tensors("unet").values()][:count]
    result = NUMPY[case.split()[0]](taken, parameters, working)
    assert result.dtype == working
    rounded = torch.from_numpy(result.astype(np.float32)).to(DTYPES[dtype][0])
    found = merged(case, dtype, inputs[dtype])
    if case == "karcher":  # the reference rounds on its way
        assert torch.allclose(rounded.double(), found.double(), rtol=1e-9 if dtype == "fp32" else 2**-7, atol=1e-9)
    else:
        assert torch.equal(rounded, found)


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


def np_line(a: Array, b: Array, weight: Any, real: Callable[[float], Any]) -> Array:
    if isinstance(weight, float):
        if abs(weight) < 0.5:
            return a + (b - a) * real(weight)
        return b - (b - a) * real(float(1 - Fraction(repr(weight))))
    return np.where(np.abs(weight) < 0.5, a + (b - a) * weight, b - (b - a) * (real(1) - weight))


def np_linear(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    weights = [Fraction(repr(w)) for w in parameters["weights"]]
    shares = [float(w / sum(weights)) for w in weights]
    if len(m) == 2:
        return np_line(m[0], m[1], shares[1], real)
    return (m[0] * real(shares[0]) + m[1] * real(shares[1])) + m[2] * real(shares[2])


def np_total(terms: list[Array]) -> Array:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def np_task_arithmetic(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    weights = [Fraction(repr(w)) for w in parameters["weights"]]
    factors = [float(Fraction(repr(parameters["scale"])) * w / sum(weights)) for w in weights]
    return m[0] + np_total([(x - m[0]) * real(f) for x, f in zip(m[1:], factors, strict=True)])


def np_trim(d: Array, density: float, gamma: float = 0.0) -> Array:
    """All numbers in the order of their magnitude, the first of equal ones first; a run of them is kept."""
    count = d.size
    kept = math.floor(Fraction(repr(density)) * count)
    top = min(math.floor(Fraction(repr(gamma)) * count), count - kept)
    chosen = np.argsort(-np.abs(d).ravel(), kind="stable")[top : top + kept]
    result = np.zeros_like(d).ravel()
    result[chosen] = d.ravel()[chosen]
    return result.reshape(d.shape)


def np_vote(
    scaled: list[Array], weights: list[float], vote: str, normalize: bool, real: Callable[[float], Any]
) -> Array:
    ballots = scaled if vote == "sum" else [np.sign(x) for x in scaled]
    elected = np.where(np_total(ballots) >= 0, 1, -1)
    agree = [np.sign(x) == elected for x in scaled]
    total = np_total([np.where(yes, x, real(0)) for x, yes in zip(scaled, agree, strict=True)])
    if not normalize:
        return total
    exact = [Fraction(repr(w)) for w in weights]
    which = list(itertools.product([0, 1], repeat=len(exact)))  # the first weight counts in the latter half
    sums = [sum((w * yes for w, yes in zip(exact, row, strict=True)), Fraction(0)) for row in which]
    table = np.array([real(float(each)) if each else real(1) for each in sums])
    return total / table[np_total([yes * 2**i for i, yes in enumerate(reversed(agree))])]


def np_ties(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    weights = parameters["weights"]
    scaled = [np_trim(x - m[0], parameters["density"]) * real(w) for x, w in zip(m[1:], weights, strict=True)]
    voted = np_vote(scaled, weights, parameters["vote"], parameters["normalize"], real)
    return m[0] + voted * real(parameters["scale"])


def np_dare(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    density, weights = Fraction(repr(parameters["density"])), parameters["weights"]
    scaled = []
    for i, (x, w) in enumerate(zip(m[1:], weights, strict=True)):
        names = ["sdforge.dare", str(parameters.get("seed", 0)), parameters["tensor"], str(i + 1)]
        mask = np.array([Fraction(word, 2**32) < density for word in words(x.size, *names)]).reshape(x.shape)
        scaled.append(np.where(mask, x - m[0], real(0)) * real(float(Fraction(repr(w)) / density)))
    if "vote" in parameters:
        return m[0] + np_vote(scaled, weights, parameters["vote"], parameters["normalize"], real)
    return m[0] + np_total(scaled)


@cache
def words(count: int, *names: str) -> list[int]:
    """Philox4x32-10 once more, in Python's whole numbers (Salmon et al. 2011, fig. 2)."""
    digest = hashlib.sha256("\0".join(names).encode()).digest()
    found: list[int] = []
    for block in range((count + 3) // 4):
        key, c = [int.from_bytes(digest[i : i + 4], "big") for i in (0, 4)], [block, 0, 0, 0]
        for _ in range(10):
            p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [q >> 32 ^ c[1] ^ key[0], q & 0xFFFFFFFF, p >> 32 ^ c[3] ^ key[1], p & 0xFFFFFFFF]
            key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
        found += c
    return found[:count]


def np_breadcrumbs(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    density, gamma, weights = parameters["density"], parameters["gamma"], parameters["weights"]
    return m[0] + np_total([np_trim(x - m[0], density, gamma) * real(w) for x, w in zip(m[1:], weights, strict=True)])


def np_sum_twice(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    return np_line(np_line(m[0], m[1], parameters["alpha"], real), m[2], parameters["beta"], real)


def np_scale(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    return m[0] * real(parameters["weight"])


def np_train_difference(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    a, b, base = m
    u, v = np.abs(b - base), np.abs(b - a)
    with np.errstate(invalid="ignore"):
        s = np.where(u + v == 0, real(0), v / (u + v))
    factor = Fraction(repr(parameters["gain"])) * Fraction(repr(parameters["weight"]))
    return a + (b - base) * (s * real(float(factor)))


def np_similarity_add_difference(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    a, b, base = m
    alpha = parameters["alpha"]
    larger = np.maximum(np.abs(a), np.abs(b))
    with np.errstate(invalid="ignore"):
        likeness = np.where(larger == 0, real(1), (a / larger) * (b / larger))
    q = (likeness + real(1)) * real(0.5) * real(parameters["beta"])
    return np_line(a + (b - base) * real(alpha), np_line(a, b, alpha * 0.5, real), q, real)


def np_add_perpendicular(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    a, b, base = m
    own, learned = a - base, b - base
    wide, other = own.astype(np.float64), learned.astype(np.float64)
    along = float(Fraction(np_dot(wide, other)) / Fraction(np_dot(wide, wide)))
    return a + (learned - own * real(along)) * real(parameters["weight"])


def np_model_stock(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    base, *others = m
    d = [x - base for x in others]
    wide = [x.astype(np.float64) for x in d]
    if parameters:  # filters, of two checkpoints
        x, y = (each.T for each in wide)
        c = np_columns(x * y) / (np.sqrt(np_columns(x * x)) * np.sqrt(np_columns(y * y)))
        return base + np_total(d) * (np.clip(2 * c / (1 + c), 0, 1) / 2).astype(base.dtype)[:, None]
    with localcontext(Context(prec=60)):
        lengths = [Decimal(np_dot(x, x)).sqrt() for x in wide]
        pairs = [(0, 1), (0, 2), (1, 2)]
        cosines = [Decimal(np_dot(wide[i], wide[j])) / (lengths[i] * lengths[j]) for i, j in pairs]
        c = sum(cosines, Decimal(0)) / 3
        t = 3 * c / (1 + 2 * c)
        return base + np_total(d) * real(float(t / 3))


def np_cosine(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    a, b = (x.astype(np.float64) for x in m)
    q = np_columns(a * b) / (np.sqrt(np_columns(a * a)) * np.sqrt(np_columns(b * b)))
    if parameters.get("similarity") == "mean":
        with localcontext(Context(prec=60)):
            lengths = Decimal(np_dot(a, a)).sqrt() * Decimal(np_dot(b, b)).sqrt()
            q = (q + float(Decimal(np_dot(a, b)) / lengths)) * 0.5
    k = np.clip(q - parameters["weight"], 0, 1).astype(m[0].dtype)
    return np_line(m[1], m[0], k, real)


def np_columns(x: Array) -> Array:
    total = np.zeros(x.shape[1:])
    for start in range(0, len(x), 256):
        rows = x[start : start + 256]
        rows = np.concatenate([rows, np.zeros((256 - len(rows), *x.shape[1:]))])
        while len(rows) > 1:
            rows = rows[: len(rows) // 2] + rows[len(rows) // 2 :]
        total = total + rows[0]
    return total


def np_tensor_sum(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:  # noqa: ARG001
    start, width, count = (Fraction(repr(parameters["offset"])), Fraction(repr(parameters["width"])), len(m[0]))
    stays = range(math.floor(count * (start + width - 1)), math.floor(count * start))  # it wraps
    return np.stack([m[0][i] if i in stays else m[1][i] for i in range(count)])


def np_clamp(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    a, *bounds = m
    lowest, highest = np.min(bounds, axis=0), np.max(bounds, axis=0)
    if stiffness := parameters["stiffness"]:
        mean = np_total(bounds) * real(1 / 3)
        above = np.min([np.where(x >= mean, x, highest) for x in bounds], axis=0)
        below = np.max([np.where(x <= mean, x, lowest) for x in bounds], axis=0)
        lowest, highest = np_line(lowest, below, stiffness, real), np_line(highest, above, stiffness, real)
    return np.where(a < lowest, lowest, np.where(a > highest, highest, a))


def np_subtract(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    return (m[0] - m[1]) * real(parameters["weight"])


def np_add(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    return m[0] + m[1] * real(parameters["weight"])


def np_adjust(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:  # noqa: ARG001
    return m[0] * real(1.06)


def np_nearswap(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    share = real(parameters["t"]) / np.maximum(np.abs(m[0] - m[1]), real(parameters["t"]))
    return np_line(m[0], m[1], share, real)


def np_euclidean_add_difference(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    a, b, base = m
    w = parameters["weight"]
    straight = np_line(a - base, b - base, w, real)
    x, y = ((v - base) * real(float(1 / np_norm(v - base))) for v in (a, b))
    curved = np.copysign(np.sqrt(x * x * real(1 - w) + y * y * real(w)), np.where(straight == 0, 1, straight))
    return base + curved * real(float(np_norm(straight) / np_norm(curved)))


def np_norm(x: Array) -> Decimal:
    wide = x.astype(np.float64)
    return Decimal(np_dot(wide, wide)).sqrt()


def np_extract_similar(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    x, y = m[1] - m[0], m[2] - m[0]
    wide_x, wide_y = x.astype(np.float64).T, y.astype(np.float64).T
    lengths = np.sqrt(np_columns(wide_x * wide_x)) * np.sqrt(np_columns(wide_y * wide_y))
    likeness = (np.clip(np_columns(wide_x * wide_y) / lengths, -1, 1) + 1) * 0.5
    d = likeness * likeness * likeness
    kept = np_line(d, 1 - d, parameters["beta"], np.float64).astype(x.dtype)
    return m[0] + np_line(x, y, parameters["alpha"], real) * kept[:, None]


def np_geometric_median(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    """Weiszfeld's steps on the products of differences, in 60 digits."""
    d = [x - m[0] for x in m]
    wide = [x.astype(np.float64) for x in d]
    n = range(len(m))
    with localcontext(Context(prec=60)):
        products = [[Decimal(np_dot(wide[i], wide[j])) for j in n] for i in n]
        w = [Decimal(1) / len(m) for _ in m]
        for _ in range(parameters["max_iter"]):
            along = [sum(w[j] * products[i][j] for j in n) for i in n]
            square = sum(w[i] * along[i] for i in n)
            inverse = [1 / (products[i][i] - 2 * along[i] + square).sqrt() for i in n]
            w = [each / sum(inverse) for each in inverse]
        return m[0] + np_total([d[i] * real(float(w[i])) for i in n[1:]])


def np_karcher(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:  # noqa: ARG001
    """The steps on the vectors themselves, in fp64: right to 12 digits, and so after rounding to 16 bits or nearly."""
    wide = [x.astype(np.float64) for x in m]
    lengths = [float(np_norm(x)) for x in wide]
    units = [x / length for x, length in zip(wide, lengths, strict=True)]
    mean = np_total(units)
    mean = mean / np.linalg.norm(mean)
    for _ in range(parameters["max_iter"]):
        step = np.zeros_like(mean)
        for u in units:
            cosine = float(np.sum(u * mean))
            step = step + math.acos(cosine) / math.sqrt(1 - cosine**2) / len(m) * (u - cosine * mean)
        length = np.linalg.norm(step)
        if length < parameters["tol"]:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * step
    found = mean * sum(lengths) / len(lengths)
    return found.astype(m[0].dtype)


def np_sce(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    d = [x - m[0] for x in m[1:]]
    mean = np_total(d) * real(1 / 3)
    spread = np_total([(x - mean) * (x - mean) for x in d])
    count = int(Fraction(repr(parameters["select_topk"])) * int(np.count_nonzero(spread)))
    mask = np.zeros(spread.size, bool)
    mask[np.argsort(-spread.ravel(), kind="stable")[:count]] = True
    d = [np.where(mask.reshape(x.shape), x, real(0)) for x in d]
    energies = [Decimal(np_dot(x.astype(np.float64), x.astype(np.float64))) for x in d]
    weights = [float(each / sum(energies)) for each in energies]
    elected = np.where(np_total(d) >= 0, 1, -1)
    agree = [np.sign(x) == elected for x in d]
    above = np_total([np.where(yes, x * real(w), real(0)) for x, w, yes in zip(d, weights, agree, strict=True)])
    below = np_total([np.where(yes, real(w), real(0)) for w, yes in zip(weights, agree, strict=True)])
    return m[0] + above / np.where(below == 0, real(1), below)


def np_della(m: list[Array], parameters: dict[str, Any], real: Callable[[float], Any]) -> Array:
    weights, scaled = parameters["weights"], []
    least, each = 0.3, float(Fraction(2, 5) / (m[0].shape[1] - 1))  # density ∓ epsilon
    for i, (x, w) in enumerate(zip(m[1:], weights, strict=True)):
        d = x - m[0]
        ranks = np.empty(d.shape)
        for row, values in enumerate(np.abs(d)):
            ranks[row, np.argsort(values, kind="stable")] = np.arange(len(values))
        chances = ranks * each + least
        drawn = np.array(words(d.size, "sdforge.della", "0", parameters["tensor"], str(i + 1)), dtype=np.float64)
        kept = drawn.reshape(d.shape) < chances * 2.0**32
        scaled.append(np.where(kept, d / chances.astype(d.dtype), real(0)) * real(w))
    return m[0] + np_vote(scaled, weights, "sum", True, real)


NUMPY = {name.removeprefix("np_"): f for name, f in list(globals().items()) if name.startswith("np_")}


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        found = write_inputs(Path(folder))
        print(json.dumps({c: {d: digest(merged(c, d, found[d])) for d in DTYPES} for c in CASES}, indent=2))
