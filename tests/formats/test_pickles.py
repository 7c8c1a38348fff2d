"""Pickles that are written without torch are those that torch reads."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from sdforge.formats.pickled import Pickled, write_pickle

PLAIN: dict[Any, Any] = {
    "name": "<tőy>",
    265: [1, -2, 3.5, None, True, False],
    "nested": {"empty": {}, "none": [], "deep": [{"a": [1]}]},
    "long": "x" * 300,
}


def matrix(dtype: str = "F32") -> Pickled:
    data = struct.pack("<6e" if dtype == "F16" else "<6f", *range(6))
    return Pickled(dtype, (2, 3), lambda: [data[:4], data[4:]])


def written(path: Path, value: Any) -> Any:
    write_pickle(path, value)
    return torch.load(path, weights_only=True)


def test_values_come_back(tmp_path: Path) -> None:
    assert written(tmp_path / "a.pt", PLAIN) == PLAIN


@pytest.mark.parametrize(("dtype", "expected"), [("F16", torch.float16), ("F32", torch.float32)])
def test_tensors_come_back_with_type_and_shape(dtype: str, expected: torch.dtype, tmp_path: Path) -> None:
    found = written(tmp_path / "a.pt", {"a": matrix(dtype), 320: [matrix(dtype)]})
    for tensor in (found["a"], found[320][0]):
        assert tensor.dtype is expected
        assert torch.equal(tensor, torch.arange(6).reshape(2, 3).to(expected))


def test_equal_values_are_equal_files(tmp_path: Path) -> None:
    digests = set()
    for name in ("a.pt", "b.pt"):
        write_pickle(tmp_path / name, {"a": matrix(), **PLAIN})
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1
