"""How far two tensors are apart, chunk by chunk: numbers of any float type, read where they lie, summed in fp64."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdforge.dtypes import ITEM_SIZE
from sdforge.errors import UsageError
from sdforge.formats.safetensors import read_range
from sdforge.store.files import open_regular

NUMBERS = 1 << 20  # of each tensor that are held at once
TYPES: dict[str, str] = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}


class Lies(NamedTuple):
    """A tensor in a file. turned: the file holds the transpose of the matrix that `shape` describes.

    sha256: of its bytes, where that is known; "" elsewhere.
    """

    dtype: str
    shape: tuple[int, ...]
    path: str
    offset: int
    turned: bool = False
    sha256: str = ""


class Apart(NamedTuple):
    """The squares of ‖a − b‖ and ‖a‖ (2-norms over all numbers), and the largest |a − b|."""

    difference: float
    first: float
    largest: float


def apart(a: Lies, b: Lies) -> Apart:
    """Compare two tensors of one shape. Raises UsageError for types that are no numbers here, or a file that ends."""
    if a.dtype == b.dtype and a.sha256 and a.sha256 == b.sha256:
        return Apart(0.0, 0.0, 0.0)
    difference = first = largest = 0.0
    for one_N, two_N in zip(_numbers(a), _numbers(b), strict=True):
        gap_N = one_N - two_N
        difference += float(gap_N @ gap_N)
        first += float(one_N @ one_N)
        largest = max(largest, float(np.abs(gap_N).max(initial=0.0)))
    return Apart(difference, first, largest)


def norm(squares: float) -> float:
    """Return the norm of which this is the square."""
    return sqrt(squares)


def _numbers(tensor: Lies) -> Iterator[NDArray[np.float64]]:
    """Yield a tensor's numbers in C order, in chunks that are equal for equal shapes."""
    if tensor.dtype not in TYPES:
        raise UsageError(f"{tensor.path} holds numbers of type {tensor.dtype}, which are not compared")
    fd = open_regular(Path(tensor.path))
    try:
        yield from _chunks(fd, tensor)
    finally:
        os.close(fd)


def _chunks(fd: int, tensor: Lies) -> Iterator[NDArray[np.float64]]:
    size, count = ITEM_SIZE[tensor.dtype], prod(tensor.shape)
    if tensor.turned:  # a matrix, so it is small enough to be held whole
        whole = _decoded(b"".join(read_range(fd, tensor.offset, count * size)), tensor.dtype)
        columns_first = whole.reshape(tensor.shape[::-1]).T.reshape(-1)
        for start in range(0, count, NUMBERS):
            yield columns_first[start : start + NUMBERS]
        return
    for start in range(0, count, NUMBERS):
        part = min(NUMBERS, count - start)
        yield _decoded(b"".join(read_range(fd, tensor.offset + start * size, part * size)), tensor.dtype)


def _decoded(data: bytes, dtype: str) -> NDArray[np.float64]:
    raw: NDArray[Any] = np.frombuffer(data, TYPES[dtype])
    if dtype == "BF16":  # the upper half of a float of 32 bits
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float64)
