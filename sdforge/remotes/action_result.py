"""What lies under `/ac/`: an ActionResult as Bazel's Remote Execution API has it, which servers check and count.

Only its list of files is used (message ActionResult, field 2: OutputFile {path = 1, digest = 2 {hash = 1, size = 2}};
https://github.com/bazelbuild/remote-apis, build/bazel/remote/execution/v2). So a server that evicts what nobody names
keeps what our actions name, and one that checks actions when they are put takes ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sdforge.names import is_digest

MOST = 1 << 20  # bytes of one


class File(NamedTuple):
    """A file of an action: how it calls it, and under which sha256 it lies."""

    path: str
    sha256: str
    size: int


def encode(files: list[File]) -> bytes:
    """Return the ActionResult that names these files."""
    return b"".join(_field(2, _field(1, f.path.encode()) + _field(2, _digest(f))) for f in files)


def _digest(file: File) -> bytes:
    return _field(1, file.sha256.encode()) + _varint(2 << 3) + _varint(file.size)


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def decode(data: bytes) -> list[File]:
    """Return the files that an ActionResult names. Raises ValueError for what is none, or names no sha256."""
    found = []
    for number, value in _fields(data):
        if number == 2 and isinstance(value, bytes):
            outer = dict(_fields(value))
            inner = dict(_fields(_bytes(outer.get(2))))
            size = inner.get(2, 0)
            if not isinstance(size, int):
                raise ValueError("a size is no number")
            sha256 = _bytes(inner.get(1)).decode()
            if not is_digest(sha256):  # whoever may write here would name a place on this machine's disk
                raise ValueError(f"it calls a file's bytes {sha256[:80]!r}")
            found.append(File(_bytes(outer.get(1)).decode(), sha256, size))
    return found


def _bytes(value: bytes | int | None) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field is missing")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield (number, value) of each field of a message."""
    place = 0
    while place < len(data):
        tag, place = _read_varint(data, place)
        if tag & 7 == 0:
            value, place = _read_varint(data, place)
            yield tag >> 3, value
        elif tag & 7 == 2:
            length, place = _read_varint(data, place)
            if place + length > len(data):
                raise ValueError("it ends too early")
            yield tag >> 3, data[place : place + length]
            place += length
        elif tag & 7 in (1, 5):
            place += 8 if tag & 7 == 1 else 4
        else:
            raise ValueError("it is no message")


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if place >= len(data):
            raise ValueError("it ends too early")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number is too long")
