"""A strict reader of safetensors headers and a deterministic writer.

Format: 8 bytes little-endian length n, n bytes of JSON, then the tensors' bytes without holes
(https://github.com/huggingface/safetensors#format). What the reference library refuses, this reader refuses; it also
refuses what the library lets through against the format: duplicate keys, blanks before `{`, unknown fields, names
that are not printable text. The writer exists because the library writes its metadata in random order.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdforge.dtypes import ITEM_SIZE
from sdforge.errors import UsageError
from sdforge.identity import canonical
from sdforge.store.files import CHUNK, open_regular
from sdforge.store.poured import Poured

# types of plain numbers → as `struct` reads one
SCALAR = {
    "F16": "<e",
    "F32": "<f",
    "F64": "<d",
    "BOOL": "<?",
    "U8": "<B",
    "I8": "<b",
    "I16": "<h",
    "I32": "<i",
    "I64": "<q",
}
HALVES = {"BF16": ("F32", 2), "F8_E5M2": ("F16", 1)}  # a type → of which it has the high bytes, and how many it lacks
MOST_HEADER = 16 << 20  # bytes
MOST_TENSORS = 65_536
MOST_NAME = 512  # bytes
MOST_RANK = 16


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: safetensors' dtype, its shape, and where its bytes begin in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Header:
    """All that a safetensors file says about itself. `data` is where the tensors' bytes begin in `file`."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    data: int
    size: int
    file: Path


def stated_json(metadata: dict[str, str], key: str) -> Any:
    """Return what a metadata entry holds as JSON; None where there is none, or none that could be written again."""
    try:
        value = json.loads(metadata.get(key, "null"))
        canonical(value).encode()
    except (ValueError, RecursionError):  # also NaN, numbers without end and halves of letters
        return None
    return value


# how files begin that are often met under the name of a safetensors file → what they are, and the way out
OTHER_FILES = {
    b"version ": ("is a pointer of Git LFS, not the file itself", "`git lfs pull` where it was cloned gets the file"),
    b"<": ("is a web page, not the file itself", "take the address behind the download button"),
    b"GGUF": ("is a GGUF file", "only safetensors can be read: get that form of it"),
    b"PK\x03\x04": (
        "is a pickle of torch.save under another name",
        'get a safetensors file; or call it .ckpt, and state `pickle = "allow"` where its source is declared',
    ),
}


def read_header(path: Path) -> Header:
    """Read and check a file's header. Raises UsageError with one sentence for every file that is not sound."""
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        start = os.pread(fd, 8, 0)
        if len(start) < 8:
            raise _unsound(path, "is too short to be a safetensors file")
        (length,) = struct.unpack("<Q", start)
        if length > MOST_HEADER:
            _refuse_other_files(path, start)
            raise _unsound(path, f"claims a header of {length:,} bytes; the most is {MOST_HEADER:,}")
        if 8 + length > size:
            raise _unsound(path, "is cut off within its header")
        text = os.pread(fd, length, 8)
    finally:
        os.close(fd)
    return _checked(path, _parsed(path, text), 8 + length, size)


def autov3_of(path: Path) -> str:
    """Return by what Civitai knows a file's weights: 12 digits of the sha256 of all behind its header."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(read_header(path).data)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()[:12].upper()


def _refuse_other_files(path: Path, start: bytes) -> None:
    """Raise UsageError for what is known to be another kind of file by its first bytes."""
    for beginning, (sentence, hint) in OTHER_FILES.items():
        if start.startswith(beginning):
            raise UsageError(f"{path} {sentence}", hint=hint)
    if start.isascii() and all(chr(letter).isprintable() or letter in b"\t\r\n" for letter in start):
        raise UsageError(f"{path} is a text, and no safetensors file", hint="name a model's file or folder")


def _unsound(path: Path, sentence: str) -> UsageError:
    return UsageError(f"{path} {sentence}", hint="get the file again from where it came from")


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise _unsound(path, "is no safetensors file: its header does not begin with '{'")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise _unsound(path, f"names {next(n for n in names if names.count(n) > 1)!r} twice in its header")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        header = json.loads(text.decode().rstrip(" "), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise _unsound(path, "has a header that is not JSON") from None
    if not isinstance(header, dict):
        raise _unsound(path, "has a header that is no table")
    return header


def _checked(path: Path, header: dict[str, Any], data: int, size: int) -> Header:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(is_text, (*metadata, *metadata.values()))):
        raise _unsound(path, "has metadata that is not text")
    if len(header) > MOST_TENSORS:
        raise _unsound(path, f"holds {len(header):,} tensors; the most is {MOST_TENSORS:,}")
    tensors = {name: _entry(path, name, fields, data) for name, fields in header.items()}
    end = data
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset != end:
            raise _unsound(path, f"has a hole or an overlap before {name!r}")
        end += entry.size
    if end != size:
        raise _unsound(path, f"should be {end:,} bytes long and has {size:,}")
    return Header(tensors, metadata, data, size, path)


def _entry(path: Path, name: str, fields: Any, data: int) -> Entry:
    if not name.isprintable() or len(name.encode(errors="replace")) > MOST_NAME or not _is_nfc(name):
        raise _unsound(path, f"has a tensor whose name is no plain text: {name[:60]!a}")
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise _unsound(path, f"describes {name!r} with other fields than dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise _unsound(path, f"holds {name!r} in a type that is not known here: {str(dtype)[:20]}")
    if not isinstance(shape, list) or len(shape) > MOST_RANK or not all(_is_size(n) for n in shape):
        raise _unsound(path, f"gives {name!r} no sound shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise _unsound(path, f"gives {name!r} no sound place")
    entry = Entry(dtype, tuple(shape), data + offsets[0])
    if offsets[1] - offsets[0] != entry.size:
        raise _unsound(path, f"gives {name!r} {offsets[1] - offsets[0]:,} bytes where its shape needs {entry.size:,}")
    return entry


def is_text(value: object) -> bool:
    """Say whether this is text that can be written: escapes of JSON can state halves of a letter."""
    return isinstance(value, str) and (value.isascii() or value.encode(errors="ignore").decode() == value)


def _is_nfc(name: str) -> bool:
    return name.isascii() or unicodedata.is_normalized("NFC", name)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def read_range(fd: int, offset: int, size: int) -> Iterator[bytes]:
    """Yield `size` bytes from `offset` in chunks. Raises UsageError if the file ends before."""
    while size:
        chunk = os.pread(fd, min(size, CHUNK), offset)
        if not chunk:
            raise UsageError("a file became shorter while it was read")
        yield chunk
        offset += len(chunk)
        size -= len(chunk)


def read_number(header: Header, dtype: str, offset: int) -> float | None:
    """Return one number of a file; None for a type that holds no plain number, and where the file ends before."""
    with header.file.open("rb") as file:
        data = os.pread(file.fileno(), ITEM_SIZE[dtype], offset)
    if dtype in HALVES and data:  # the high bytes of a wider type
        dtype, more = HALVES[dtype]
        data = bytes(more) + data
    if dtype == "F8_E4M3" and data:
        return _e4m3(data[0])
    form = SCALAR.get(dtype)
    return float(struct.unpack(form, data)[0]) if form and len(data) == ITEM_SIZE[dtype] else None


def _e4m3(byte: int) -> float:
    """Return a number of 8 bits: sign, 4 bits of the exponent from −7 on, 3 bits; without Inf (arXiv 2209.05433)."""
    exponent, fraction = byte >> 3 & 15, byte & 7
    size = math.nan if byte & 127 == 127 else math.ldexp(fraction + 8 * bool(exponent), max(exponent, 1) - 10)
    return -size if byte & 128 else size


def fill(fd: int, memory: memoryview, offset: int) -> None:
    """Read as many bytes from `offset` as the memory has. Raises UsageError if the file ends before."""
    while memory:
        count = os.preadv(fd, [memory], offset)
        if not count:
            raise UsageError("a file became shorter while it was read")
        memory, offset = memory[count:], offset + count


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: sha256 of the whole file and of the bytes after the header, and where each tensor lies."""

    sha256: str
    data_sha256: str
    size: int
    offsets: dict[str, int]


def header_bytes(
    shapes: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str], align: int = 8
) -> tuple[bytes, list[str]]:
    """Lay a file out: (its first bytes up to the data, the tensors' names in the order of their bytes).

    The widest dtypes come first, then names, so that every tensor is aligned to its items; metadata is sorted. align:
    of what the data's place in the file is a multiple, in bytes (8 or a multiple of it).
    """
    order = sorted(shapes, key=lambda name: (-ITEM_SIZE[shapes[name][0]], name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    place = 0
    for name in order:
        dtype, shape = shapes[name]
        end = place + math.prod(shape) * ITEM_SIZE[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % align)
    return struct.pack("<Q", len(text)) + text, order


def write_file(
    path: Path,
    shapes: dict[str, tuple[str, tuple[int, ...]]],
    content: Callable[[str], Iterable[bytes | memoryview]],
    metadata: dict[str, str] | None = None,
    align: int = 8,
) -> Written:
    """Write a file whose bytes depend on nothing but the arguments; not yet flushed to the disk.

    shapes: name → (dtype, shape); content: name → its bytes, in chunks, asked for once each in the file's order; align:
    see `header_bytes`.
    """
    first, order = header_bytes(shapes, metadata or {}, align)
    sizes = {name: math.prod(shape) * ITEM_SIZE[dtype] for name, (dtype, shape) in shapes.items()}
    offsets: dict[str, int] = {}
    with Poured(path, first, len(first) + sum(sizes.values()), body=True) as file:
        for name in order:
            offsets[name] = file.told()
            for chunk in content(name):
                file.write(chunk)
            if file.told() - offsets[name] != sizes[name]:
                raise ValueError(f"{name} was given {file.told() - offsets[name]} bytes")
        file.close()
        return Written(file.sha256, file.body_sha256, file.size, offsets)
