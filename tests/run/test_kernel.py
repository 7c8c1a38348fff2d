"""The compiled kernel gives torch's bytes, is used where it serves, and is missed by nobody where it does not."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdforge import kernel
from sdforge.errors import ActionFailed
from sdforge.exact import line
from sdforge.kernel import build
from sdforge.order import Computation
from sdforge.run import formula, fused
from sdforge.run.fused import CannotBeNoted, Factors, Fused, Noted, Notes
from sdforge.run.tensors import rounded
from tests.families.workbench import keep, reference, same_bytes

NARROW = (torch.float16, torch.bfloat16)
RESULTS = (*NARROW, torch.float32)
# what merges noted down are: of sums, differences and products alone
NOTED: dict[str, dict[str, Any]] = {
    "weighted_sum": {"weights": [0.7, 0.3]},
    "add_difference": {"weight": 0.3},
    "linear": {"weights": [0.4, -0.9]},
    "subtract": {"weight": 0.6},
    "sum_twice": {"alpha": 0.2, "beta": 0.7},
    "scale": {"weight": 0.4},
}
COUNTS = {"add_difference": 3, "sum_twice": 3, "scale": 1}


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    if why := kernel.missing():
        reason = build.build()
        if "compiler" in reason or "x86-64" in reason or why == "FORGE_KERNEL is off":
            pytest.skip(f"{why}: {reason}")
        kernel.kernel.cache_clear()
        fused.without.cache_clear()
    assert fused.without() == ""


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, size: float = 1.0) -> Tensor:
    return (size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def computation(work: Path, method: str, parameters: dict[str, Any], tensors: list[Tensor], dtype: str) -> Computation:
    taken = keep(work, {"unet": {f"t{i}": tensor for i, tensor in enumerate(tensors)}})
    rows = {row.name: reference(row, taken.files) for row in taken.tables["unet"]}
    inputs = tuple(rows[f"t{i}"] for i in range(len(tensors)))
    return Computation("unet", "x", dtype, tuple(tensors[0].shape), method, parameters, inputs)


def both(wanted: Computation, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return what the kernel and torch make of a computation: a tensor, or why there is none."""
    found = []
    for why_not in ("", "it is left out"):
        with monkeypatch.context() as patch:
            patch.setattr(formula, "without", lambda why_not=why_not: why_not)
            try:
                parts = [part.reshape(-1).clone() for part in formula.results(wanted, "unet.x")]
                found.append(torch.cat(parts))
            except ActionFailed as error:
                found.append(error.message)
    return found


def noted(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """Return a list of what the kernel will have made."""
    ran: list[Tensor | None] = []
    again = Fused.again

    def watched(fused: Fused) -> Tensor | None:
        ran.append(again(fused))
        return ran[-1]

    monkeypatch.setattr(Fused, "again", watched)
    return ran


def made(notes: Notes, result: Noted, dtype: torch.dtype) -> Tensor | None:
    """Return what the kernel makes of notes, or None where it does not."""
    fused = notes.fused(result, dtype)
    return fused.run(notes.inputs) if fused else None


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("method", NOTED)
def test_a_merge_of_sums_and_products_is_one_pass_with_the_bytes_of_torch(
    method: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of inputs of 16 bits, and of one that is wider, so that all is fp64."""
    monkeypatch.setattr(formula, "ONE_PASS", 1 << 10)
    monkeypatch.setattr(formula, "PART", 1 << 9)
    for wide in (False, True):
        types = [NARROW[i % 2] for i in range(COUNTS.get(method, 2))]
        types[-1] = torch.float32 if wide else types[-1]
        tensors = [random((37, 101), each, i) for i, each in enumerate(types)]
        wanted = computation(tmp_path / f"{wide}", method, NOTED[method], tensors, dtype)
        ran = noted(monkeypatch)
        ours, torchs = both(wanted, monkeypatch)
        assert len(ran) == 1 + -(-(37 * 101 - 512) // 1024)  # the first part is small, and torch's are not noted
        assert all(part is not None for part in ran)
        assert same_bytes(ours, torchs)


@pytest.mark.parametrize("ranks", [(4,), (4, 3)])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_a_bake_ends_in_one_pass_with_the_bytes_of_torch(
    ranks: tuple[int, ...], dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [random((48, 40), torch.float16, 0)]
    for rank in ranks:
        tensors += [random((48, rank), torch.float16, rank), random((rank, 40), torch.bfloat16, rank + 1)]
    wanted = computation(tmp_path, "bake", {"scales": [0.7, -1.3][: len(ranks)]}, tensors, dtype)
    ran = noted(monkeypatch)
    ours, torchs = both(wanted, monkeypatch)
    assert len(ran) == 1
    assert ran[0] is not None
    assert same_bytes(ours, torchs)


def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the rows of each part of which a method will have been asked what it does."""
    counts: list[int] = []
    begin = Notes.__init__

    def watched(notes: Notes, dtype: torch.dtype, shape: torch.Size) -> None:
        counts.append(shape[0])
        begin(notes, dtype, shape)

    monkeypatch.setattr(Notes, "__init__", watched)
    return counts


@pytest.mark.parametrize("variant", ["avx512", "avx2"])
@pytest.mark.parametrize("ranks", [(1,), (32,), (3, 5, 64), (256,), (200, 57), (300,), (1,) * 9])
@pytest.mark.parametrize(("rows", "columns"), [(1, 40), (50, 193), (19, 600)])
def test_products_are_made_within_the_pass_where_there_is_room(
    rows: int, columns: int, ranks: tuple[int, ...], variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tiles of 16 × 192, of which the last ones are cut off, part by part; what is left over is made by torch."""
    monkeypatch.setattr(formula, "ONE_PASS", 19 * columns)
    monkeypatch.setattr(formula, "PART", 7 * columns)
    library = kernel.kernel()
    assert library is not None
    library.usable(variant == "avx512")
    tensors = [random((rows, columns), torch.float16, 0)]
    for seed, rank in enumerate(ranks):
        tensors += [random((rows, rank), torch.float16, seed), random((rank, columns), torch.bfloat16, seed + 1)]
    wanted = computation(tmp_path, "bake", {"scales": [0.7] * len(ranks)}, tensors, "F16")
    counts, ran = asked(monkeypatch), noted(monkeypatch)
    inside: list[list[bool]] = []
    fused = Notes.fused
    monkeypatch.setattr(
        Notes,
        "fused",
        lambda notes, *rest: inside.append([isinstance(x, Factors) for x in notes.inputs]) or fused(notes, *rest),
    )
    try:
        ours, torchs = both(wanted, monkeypatch)
    finally:
        library.usable(1)
    assert same_bytes(ours, torchs)
    assert len(ran) == 1 + -(-max(0, rows - 7) // 19)
    assert all(part is not None for part in ran)
    room = {(200, 57): [True, False], (300,): [False], (1,) * 9: [True] * 8 + [False]}
    assert inside[0] == [False, *room.get(ranks, [True] * len(ranks))]
    parts = {1: [1], 50: [7, 19, 19, 5], 19: [7, 12]}[rows]
    # the method is asked once for parts of one shape, and for each part where torch makes something of its own rows
    assert counts == (parts if ranks in room else list(dict.fromkeys(parts)))


def test_a_product_of_another_shape_or_type_is_left_to_torch() -> None:
    left, right = torch.ones(4, 2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    wide = Notes(torch.float64, (4, 3))
    assert len(wide.products([(left, right)])) == 1
    assert wide.products([(left.float(), right)]) == []
    assert wide.products([(left, right.T.contiguous().T)]) == []
    assert wide.products([(torch.ones(6, 2).double(), torch.ones(2, 2).double())]) == []  # other columns than the first
    assert Notes(torch.float32, (4, 3)).products([(left, right)]) == []
    with pytest.raises(CannotBeNoted):
        wide.products([(left[:2], right)])


@pytest.mark.parametrize("updates", [1, 2])
def test_whatever_a_bake_adds_it_ends_in_one_pass(
    updates: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formula, "PART", 10 * 40)
    monkeypatch.setattr(formula, "ONE_PASS", 10 * 40)
    tensors = [random((48, 40), torch.float16, 0)]
    for i in range(updates):
        tensors += [random(shape, torch.float16, i) for shape in ((48, 3), (3, 40)) * 2]
    names = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]
    own = ["lora", 4, {"form": "loha", "factors": names, "scale": 0.3}]
    ran, counts = noted(monkeypatch), asked(monkeypatch)
    ours, torchs = both(computation(tmp_path, "bake", {"updates": [own] * updates}, tensors, "F16"), monkeypatch)
    assert counts == [10, 8]  # the method is asked once for parts of one shape
    assert len(ran) == 5
    assert all(part is not None for part in ran)
    assert same_bytes(ours, torchs)


@pytest.mark.parametrize(("method", "parameters"), [("slerp", {"weight": 0.5}), ("cosine", {"weight": 0.5})])
def test_what_needs_more_than_sums_and_products_is_left_to_torch(
    method: str, parameters: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = computation(tmp_path, method, parameters, [random((9, 9), torch.float16, i) for i in range(2)], "F16")
    ran = noted(monkeypatch)
    ours, torchs = both(wanted, monkeypatch)
    assert ran == []
    assert same_bytes(ours, torchs)


def test_what_cannot_be_noted_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formula, "PART", 1 << 9)
    tensors = [random((37, 101), torch.float16, i) for i in range(3)]
    begun: list[torch.dtype] = []

    def begin(dtype: torch.dtype, shape: torch.Size) -> Notes:
        begun.append(dtype)
        return Notes(dtype, shape)

    monkeypatch.setattr(formula, "Notes", begin)
    ours, torchs = both(computation(tmp_path, "nearswap", {"t": 0.01}, tensors[:2], "F16"), monkeypatch)
    assert begun == [torch.float32]
    assert same_bytes(ours, torchs)


WRONG = {
    "NaN in an input": (float("nan"), 1.0),
    "Inf in an input": (float("inf"), 1.0),
    "-Inf in an input": (float("-inf"), 1.0),
    "Inf that counts nothing": (float("inf"), 0.0),
    "too large for fp16": (6e4, 3.0),
    "too large, and negative": (-6e4, 3.0),
    "the largest number, rounded up": (65504.0, 1.0002),
    "just not too large": (65504.0, 1.0001),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("method", ["scale", "add_difference", "bake"])
def test_what_is_wrong_with_numbers_is_said_as_without_the_kernel(
    what: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value, weight = WRONG[what]
    tensors = [random((40, 40), torch.float16, i, size=0.01) for i in range(3)]
    tensors[0 if method != "add_difference" else 1][5, 3] = value
    parameters: dict[str, Any] = {"weight": weight} if method != "bake" else {"scales": [weight * 1e6]}
    wanted = computation(
        tmp_path,
        method,
        parameters,
        tensors[:1] if method == "scale" else tensors,
        "BF16" if "largest" in what else "F16",
    )
    ours, torchs = both(wanted, monkeypatch)
    assert isinstance(ours, str) == isinstance(torchs, str)
    assert ours == torchs if isinstance(ours, str) else same_bytes(ours, torchs)


OPERATIONS: list[Callable[[Any, Any], Any]] = [operator.add, operator.sub, operator.mul]
STEP = st.tuples(
    st.sampled_from(OPERATIONS),
    st.integers(0, 11),
    st.one_of(st.integers(0, 11), st.floats(-4, 4, allow_nan=False, width=64)),
)


@settings(max_examples=150)
@given(
    types=st.lists(st.sampled_from(NARROW), min_size=1, max_size=3),
    wide=st.booleans(),
    result=st.sampled_from(RESULTS),
    steps=st.lists(STEP, min_size=1, max_size=6),
    count=st.integers(1, 1100),
    seed=st.integers(0, 2**31),
)
def test_any_sums_and_products_have_the_bytes_of_torch(
    types: list[torch.dtype], wide: bool, result: torch.dtype, steps: list[Any], count: int, seed: int
) -> None:
    """From the smallest numbers to those whose products overflow, in runs that end where no vector does."""
    working = torch.float64 if wide else torch.float32
    sizes = (1e-6, 1e-2, 30.0)
    tensors = [random((count,), each, seed + i, sizes[(seed + i) % 3]) for i, each in enumerate(types)]
    notes = Notes(working, (count,))
    values: list[Any] = [notes.given(tensor) for tensor in tensors]
    plain: list[Any] = [tensor.to(working) for tensor in tensors]
    for operation, left, right in steps:
        for numbers in (values, plain):
            other = right if isinstance(right, float) else numbers[right % len(numbers)]
            numbers.append(operation(numbers[left % len(numbers)], other))
    for i in range(len(tensors)):  # of all that is given something is made
        for numbers in (values, plain):
            numbers.append(numbers[-1] + numbers[i])
    found = made(notes, values[-1], result)
    try:
        expected = rounded("x", plain[-1], result)
    except ActionFailed:
        expected = None
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert same_bytes(found, expected)


def test_a_constant_of_0_is_not_one_of_minus_0() -> None:
    a = torch.ones(3, dtype=torch.float16)
    for constant in (0.0, -0.0):
        notes = Notes(torch.float32, (3,))
        found = made(notes, notes.given(a) * constant, torch.float16)
        assert found is not None
        assert same_bytes(found, a * constant)


def test_what_becomes_of_the_type_of_a_noted_tensor_takes_part() -> None:
    a, change = random((600,), torch.float16, 0), random((600,), torch.float64, 1)
    before = change.clone()
    notes = Notes(torch.float64, (600,))
    weight: Any = notes.given(a)
    found = made(notes, change.type_as(weight).mul_(0.3).add_(weight), torch.float16)  # type: ignore[arg-type]
    assert found is not None
    assert same_bytes(found, (a.double() + change * 0.3).float().half())
    assert torch.equal(change, before)


def test_a_line_is_noted_as_it_is_computed() -> None:
    a, b = (random((700,), torch.float16, seed) for seed in (0, 1))
    for weight in (0.3, 0.8, 0.0, 1.0):
        notes = Notes(torch.float32, (700,))
        noted: Any = line(*map(notes.given, (a, b)), weight)  # type: ignore[arg-type]
        found = made(notes, noted, torch.float16)
        assert found is not None
        assert same_bytes(found, line(a.float(), b.float(), weight).half())


REFUSED: dict[str, Callable[[Any, Tensor], Any]] = {
    "a function": lambda x, _: x.abs(),
    "an attribute": lambda x, _: x.T,
    "a division": lambda x, _: x / 2,
    "a number less it": lambda x, _: 1 - x,
    "a comparison": lambda x, _: x > 0,
    "equality": lambda x, _: x == x,
    "a question": lambda x, _: 1 if x else 0,
    "its elements": lambda x, _: x[0],
    "torch's functions": lambda x, _: torch.where(torch.ones(3, dtype=torch.bool), x, x),
    "an alpha": lambda x, _: torch.add(x, x, alpha=2),
    "a tensor that somebody may need": lambda x, real: x + real,
    "a tensor to write over": lambda x, real: torch.add(x, x, out=real),
    "a tensor in place": lambda x, real: real.add_(x),
    "other notes": lambda x, real: x + Notes(torch.float32, (3,)).given(real),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_noted_says_so_and_changes_nothing(what: str) -> None:
    real = torch.ones(3)
    with pytest.raises(CannotBeNoted):
        REFUSED[what](Notes(torch.float32, (3,)).given(torch.ones(3, dtype=torch.float16)), real)
    assert torch.equal(real, torch.ones(3))


def test_only_what_the_kernel_reads_is_given_to_it() -> None:
    notes = Notes(torch.float32, (2, 3))
    notes.given(torch.ones(2, 3, dtype=torch.float16))
    for other in (
        torch.ones(3, dtype=torch.float16),
        torch.ones(2, 3, dtype=torch.float64),
        torch.ones(2, 3, dtype=torch.int32),
        torch.ones(3, 2, dtype=torch.float16).T,
    ):
        with pytest.raises(CannotBeNoted):
            notes.given(other)


def test_what_is_rounded_to_inf_is_seen_at_the_last_number_that_is_not() -> None:
    for number, fits in ((65519.996, True), (65520.0, False), (-65520.0, False)):
        notes = Notes(torch.float32, (2,))
        found = made(notes, notes.given(torch.tensor([1.0, number])) * 1.0, torch.float16)
        assert (found is not None) == fits


def test_what_a_result_is_written_over_is_that_result_from_then_on() -> None:
    a, b = (random((600,), torch.float16, seed) for seed in (0, 1))
    notes = Notes(torch.float32, (600,))
    x, y = map(notes.given, (a, b))
    torch.sub(y, x, out=x)  # type: ignore[call-overload]
    found = made(notes, x * 2.0, torch.float16)
    assert found is not None
    assert same_bytes(found, ((b.float() - a.float()) * 2.0).half())


def test_a_result_that_something_else_came_after_is_left_to_torch() -> None:
    notes = Notes(torch.float32, (3,))
    first = notes.given(torch.ones(3, dtype=torch.float16)) + 1.0
    assert first * 2.0 is not None
    assert made(notes, first, torch.float16) is None


def test_an_input_that_nothing_is_made_of_is_looked_at_by_torch() -> None:
    notes = Notes(torch.float32, (3,))
    x, _ = (notes.given(torch.ones(3, dtype=torch.float16)) for _ in range(2))
    assert made(notes, x + 1.0, torch.float16) is None


def test_too_many_values_and_results_of_64_bits_are_left_to_torch() -> None:
    notes = Notes(torch.float64, (3,))
    x: Noted = notes.given(torch.ones(3, dtype=torch.float16))
    x = x + 1.0
    assert made(notes, x, torch.float64) is None
    assert made(notes, x, torch.float16) is not None
    for _ in range(30):
        x = x + 1.0
    assert made(notes, x, torch.float16) is not None  # of 32 values
    x = x + 1.0
    assert made(notes, x, torch.float16) is None


# -- whether there is one ----------------------------------------------------------------------------------------------


def test_without_a_compiler_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.build(tmp_path / "kernel.shared") == "no C compiler was found (cc, gcc, clang)"
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no-such-compiler" in build.build(tmp_path / "kernel.shared")
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cc").write_text("#!/bin/sh\necho 'kernel.c: what is this?' >&2\nexit 1\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    assert build.build(tmp_path / "kernel.shared").endswith("cc said: kernel.c: what is this?")
    assert [path.name for path in tmp_path.iterdir()] == ["cc"]


def test_a_library_of_another_version_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORGE_KERNEL", raising=False)
    monkeypatch.setattr(kernel, "LIBRARY", tmp_path / "kernel.shared")
    assert kernel.missing() == "it is not compiled"
    with monkeypatch.context() as patch:
        patch.setattr(build, "fingerprint", lambda: "0123")
        assert build.build(tmp_path / "kernel.shared") == ""
    assert kernel.missing() == "it was compiled from another version"
    (tmp_path / "other.so").write_bytes(b"no library")
    monkeypatch.setattr(kernel, "LIBRARY", tmp_path / "other.so")
    assert kernel.missing() == "it cannot be loaded here"


def test_it_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_KERNEL", "off")
    assert kernel.missing() == "FORGE_KERNEL is off"


def test_a_kernel_that_computes_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "MUL_C", kernel.ADD_C)
    fused.without.cache_clear()
    fused._program.cache_clear()
    try:
        assert fused.without() == "it computes other bytes than torch here"
    finally:
        fused.without.cache_clear()


def test_a_kernel_that_multiplies_matrices_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fused.Product
    monkeypatch.setattr(fused, "Product", lambda rank, columns: whole(rank=rank - 1, columns=columns))
    fused.without.cache_clear()
    try:
        assert fused.without() == "it computes other bytes than torch here"
    finally:
        fused.without.cache_clear()


def test_it_can_do_without_the_widest_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """FORGE_KERNEL=avx2 is told to the library, which chooses among its tiles."""
    told: list[bool] = []

    class Library:
        source = staticmethod(lambda: build.fingerprint().encode())

        def usable(self, avx512: bool) -> int:
            told.append(avx512)
            return 1

    Library.source.restype = None  # type: ignore[attr-defined]
    monkeypatch.setattr(kernel.ctypes, "CDLL", lambda _: Library())
    for wish in ("on", "avx2"):
        monkeypatch.setenv("FORGE_KERNEL", wish)
        assert kernel.missing() == ""
    assert told == [True, False]
