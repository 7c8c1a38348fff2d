"""Pickles as `torch.save` writes them, for programs that read nothing else: written here without running torch.

A zip of stored files: `data.pkl` (opcodes of pickle's protocol 2; tensors are rebuilt by `torch._utils`), the bytes of
each tensor, and a version. What is written here loads with `weights_only=True`. Nothing here reads a pickle: one is
told by its first bytes, and `import_step` has it converted.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

STORAGES = {"F16": "HalfStorage", "BF16": "BFloat16Storage", "F32": "FloatStorage", "F64": "DoubleStorage"}
ENDINGS = (".ckpt", ".pt", ".pth", ".bin")  # of files that are pickles unless they begin as safetensors do
ROOT = "archive"
BEFORE_ALL = (1980, 1, 1, 0, 0, 0)  # the first date that a zip can state, so that equal files are equal bytes


class Pickled(NamedTuple):
    """A tensor in a pickle: safetensors' name of its type, its shape, and its bytes when they are wanted."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes]]


def is_pickle(path: Path) -> bool:
    """Say whether a file is a pickle, bare or in a zip, by how it begins; what cannot be looked into, by its ending."""
    start = b""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(9)
    if start[8:] == b"{":
        return False
    bare = start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5")
    return bare or start.startswith(b"PK\3\4") or path.suffix in ENDINGS


def write_pickle(path: Path, value: Any) -> None:
    """Write None, booleans, integers, floats, texts, lists, dicts and `Pickled` tensors, nested as they are."""
    tensors: list[Pickled] = []
    body = b"\x80\x02" + b"".join(_opcodes(value, tensors)) + b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr(_entry("data.pkl"), body)
        file.writestr(_entry("byteorder"), b"little")
        for number, tensor in enumerate(tensors):
            with file.open(_entry(f"data/{number}"), "w", force_zip64=False) as part:
                for chunk in tensor.chunks():
                    part.write(chunk)
        file.writestr(_entry("version"), b"3\n")


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"{ROOT}/{name}", BEFORE_ALL)


def _opcodes(value: Any, tensors: list[Pickled]) -> Iterator[bytes]:
    if value is None:
        yield b"N"
    elif isinstance(value, bool):
        yield b"\x88" if value else b"\x89"
    elif isinstance(value, int):
        yield b"J" + struct.pack("<i", value)
    elif isinstance(value, float):
        yield b"G" + struct.pack(">d", value)
    elif isinstance(value, str):
        data = value.encode()
        yield b"X" + struct.pack("<I", len(data)) + data
    elif isinstance(value, Pickled):
        yield from _tensor(value, tensors)
    elif isinstance(value, dict):
        yield b"}("
        for key, inner in value.items():
            yield from _opcodes(key, tensors)
            yield from _opcodes(inner, tensors)
        yield b"u"
    else:
        yield b"]("
        for inner in value:
            yield from _opcodes(inner, tensors)
        yield b"e"


def _tensor(tensor: Pickled, tensors: list[Pickled]) -> Iterator[bytes]:
    """`_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`, the storage named by its number."""
    number, strides = len(tensors), [prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape))]
    tensors.append(tensor)
    yield b"ctorch._utils\n_rebuild_tensor_v2\n(("
    yield from _opcodes("storage", tensors)
    yield b"ctorch\n" + STORAGES[tensor.dtype].encode() + b"\n"
    for part in (str(number), "cpu", prod(tensor.shape)):
        yield from _opcodes(part, tensors)
    yield b"tQ"
    yield from _opcodes(0, tensors)
    for numbers in (tensor.shape, strides):
        yield b"("
        for each in numbers:
            yield from _opcodes(each, tensors)
        yield b"t"
    yield b"\x89ccollections\nOrderedDict\n)RtR"
