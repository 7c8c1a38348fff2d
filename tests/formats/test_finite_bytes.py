"""NaN and Inf are found in bytes as torch finds them in tensors, in chunks of any length."""

from __future__ import annotations

import random

import pytest
import torch

from sdforge.formats.finite import LAST, Finite
from sdforge.run.tensors import DTYPES


def broken(dtype: str, data: bytes, size: int) -> bool:
    finite = Finite(dtype)
    for start in range(0, len(data), size):
        finite.update(data[start : start + size])
    return finite.broken


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_of_all_numbers_of_a_type_those_are_broken_that_torch_calls_so(dtype: str) -> None:
    width = DTYPES[dtype].itemsize
    patterns = torch.arange(256**width).to(torch.int32).to(torch.int16 if width == 2 else torch.int8)
    numbers = patterns.view(DTYPES[dtype])
    data = bytes(numbers.view(torch.uint8).numpy())
    finite = torch.isfinite(numbers.float())
    found = [not broken(dtype, data[i * width : (i + 1) * width], width) for i in range(len(numbers))]
    assert found == finite.tolist()


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_the_wide_types_are_told_at_the_ends_of_their_ranges(dtype: str) -> None:
    most = torch.finfo(DTYPES[dtype]).max
    for value in (0.0, -1.5, most, -most, float("nan"), float("inf"), -float("inf")):
        data = bytes(torch.tensor([value], dtype=DTYPES[dtype]).view(torch.uint8).numpy())
        assert broken(dtype, data, len(data)) == (not torch.isfinite(torch.tensor(value, dtype=torch.float64))), value


@pytest.mark.parametrize("dtype", sorted(LAST))
def test_one_nan_anywhere_is_found_in_chunks_of_any_length(dtype: str) -> None:
    draw, places = torch.Generator().manual_seed(0), random.Random(0)
    clean = torch.randn(100, generator=draw).to(DTYPES[dtype])
    for size in (1, 3, 7, 64, 1000):
        data = bytearray(clean.view(torch.uint8).numpy())
        assert not broken(dtype, bytes(data), size)
        place = places.randrange(100) * clean.itemsize
        data[place : place + clean.itemsize] = b"\xff" * clean.itemsize
        assert broken(dtype, bytes(data), size)


def test_whole_numbers_are_never_broken() -> None:
    assert not broken("I64", b"\xff" * 64, 64)
