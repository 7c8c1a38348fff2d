"""Our reader and writer of safetensors against the reference library, and against files that somebody made to hurt."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdforge.errors import UsageError
from sdforge.formats.safetensors import MOST_HEADER, MOST_NAME, MOST_RANK, read_header, write_file
from sdforge.order import Ref
from sdforge.run.tensors import DTYPES, NAMES, load, raw
from tests.families.workbench import same_bytes

PROPERTY = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LETTERS = st.characters(min_codepoint=33, max_codepoint=126)
TABLES = st.dictionaries(
    st.text(LETTERS, min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 2**31 - 1)),
    max_size=8,
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def filled(dtype: str, shape: list[int], seed: int) -> Tensor:
    """Random bytes, read as that type (bools are 0 and 1)."""
    draw = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * DTYPES[dtype].itemsize
    data = torch.randint(0, 2 if dtype == "BOOL" else 256, (count,), generator=draw, dtype=torch.uint8)
    return data.view(DTYPES[dtype]).reshape(shape) if count else torch.empty(shape, dtype=DTYPES[dtype])


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    shapes = {name: (NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    return write_file(path, shapes, lambda name: [raw(tensors[name])], metadata).sha256


def read(path: Path) -> dict[str, Tensor]:
    found = {}
    for name, entry in read_header(path).tensors.items():
        data = path.read_bytes()[entry.offset : entry.offset + entry.size]
        found[name] = load(
            Ref(name, entry.dtype, entry.shape, str(path), entry.offset, xxhash.xxh3_128(data).hexdigest())
        )
    return found


@PROPERTY
@given(TABLES, st.dictionaries(TEXTS, TEXTS, max_size=3))
def test_the_library_reads_what_we_write(
    tmp_path: Path, table: dict[str, tuple[str, list[int], int]], metadata: dict[str, str]
) -> None:
    tensors = {name: filled(*row) for name, row in table.items()}
    write(tmp_path / "ours", tensors, metadata)
    theirs = load_file(tmp_path / "ours")
    assert set(theirs) == set(tensors)
    assert all(same_bytes(theirs[name], tensor) for name, tensor in tensors.items())


@PROPERTY
@given(TABLES)
def test_we_read_what_the_library_writes(tmp_path: Path, table: dict[str, tuple[str, list[int], int]]) -> None:
    tensors = {name: filled(*row) for name, row in table.items()}
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    ours = read(tmp_path / "theirs")
    assert set(ours) == set(tensors)
    assert all(same_bytes(ours[name], tensor) for name, tensor in tensors.items())
    assert read_header(tmp_path / "theirs").metadata == {"format": "pt"}


@PROPERTY
@given(TABLES, st.randoms(use_true_random=False))
def test_a_files_bytes_depend_on_its_content_alone(
    tmp_path: Path, table: dict[str, tuple[str, list[int], int]], shuffle: Any
) -> None:
    tensors = {name: filled(*row) for name, row in table.items()}
    order = list(tensors)
    shuffle.shuffle(order)
    metadata = {"b": "2", "a": "1", "é": "3"}
    first = write(tmp_path / "a", tensors, metadata)
    second = write(tmp_path / "b", {name: tensors[name] for name in order}, dict(reversed(metadata.items())))
    assert first == second
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_tensor_is_aligned_to_its_items(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(3).double(), "c": torch.ones(1)})
    assert all(e.offset % DTYPES[e.dtype].itemsize == 0 for e in read_header(tmp_path / "x").tensors.values())
    assert read_header(tmp_path / "x").data % 8 == 0


def test_a_writer_that_is_given_too_little_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x was given 3 bytes"):
        write_file(tmp_path / "x", {"x": ("U8", (4,))}, lambda _: [b"abc"])


def hostile(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE = {
    "empty": b"",
    "shorter than its length field": b"\x10\0\0",
    "cut off in its header": hostile({"x": entry()}, length=4000),
    "cut off in its data": hostile({"x": entry()}, b"\0\0\0"),
    "longer than it says": hostile({"x": entry()}, b"\0" * 5),
    "a header of 2^63 bytes": hostile(b"{}", length=2**63),
    "a header of 2^64 - 1 bytes": hostile(b"{}", length=2**64 - 1),
    "a header above the limit": hostile(b"{}", length=MOST_HEADER + 1),
    "no JSON": hostile(b"{nonsense"),
    "text": hostile(b"\xff\xfe\xfd{}"),
    "UTF-8 that is none": hostile(b'{"\xc3\x28": 1}'),
    "a blank before the brace": hostile(b' {"x":' + json.dumps(entry()).encode() + b"}", b"\0" * 4),
    "a list": hostile(b"[1, 2]"),
    "a number": hostile(b"17"),
    "nested without end": hostile(b'{"x":' * 100_000),
    "brackets without end": hostile(b'{"x":' + b"[" * 200_000),
    "a number of many digits": hostile(b'{"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'),
    "NaN as a size": hostile(b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"\0" * 4),
    "a name twice": hostile(
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"\0",
    ),
    "a field twice": hostile(b'{"x":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"\0"),
    "a hole": hostile({"x": entry(), "y": entry(offsets=(8, 12))}, b"\0" * 12),
    "a hole at the front": hostile({"x": entry(offsets=(4, 8))}, b"\0" * 8),
    "an overlap": hostile({"x": entry(), "y": entry(offsets=(2, 6))}, b"\0" * 6),
    "an overlap, and as many bytes to spare": hostile({"x": entry(), "y": entry(offsets=(2, 6))}, b"\0" * 8),
    "the same place twice": hostile({"x": entry(), "y": entry()}, b"\0" * 4),
    "a negative offset": hostile({"x": entry(offsets=(-4, 0))}, b"\0" * 4),
    "offsets the wrong way round": hostile({"x": entry(offsets=(4, 0))}, b"\0" * 4),
    "an offset of 2^63": hostile({"x": entry(offsets=(0, 2**63))}),
    "an offset that is no number": hostile({"x": entry(offsets=("0", "4"))}, b"\0" * 4),
    "an offset that is true": hostile({"x": entry(dtype="U8", shape=[1], offsets=(False, True))}, b"\0"),
    "three offsets": hostile({"x": entry(offsets=(0, 4, 4))}, b"\0" * 4),
    "a size that overflows": hostile({"x": entry(shape=(2**32, 2**32), offsets=(0, 0))}),
    "a negative size": hostile({"x": entry(shape=(-1,), offsets=(0, 4))}, b"\0" * 4),
    "two negative sizes": hostile({"x": entry(shape=(-1, -1))}, b"\0" * 4),
    "a size that is no whole number": hostile({"x": entry(shape=(1.0,))}, b"\0" * 4),
    "bytes that do not fit the shape": hostile({"x": entry(shape=(3,))}, b"\0" * 4),
    "bytes that do not fit the type": hostile({"x": entry(dtype="F16")}, b"\0" * 4),
    "a type nobody knows": hostile({"x": entry(dtype="F12")}, b"\0" * 4),
    "a type that is a list": hostile({"x": entry(dtype=["F32"])}, b"\0" * 4),
    "an unknown field": hostile({"x": {**entry(), "more": 1}}, b"\0" * 4),
    "a missing field": hostile({"x": {"dtype": "F32", "shape": [1]}}, b"\0" * 4),
    "a tensor that is a text": hostile({"x": "y"}),
    "metadata that is a list": hostile({"__metadata__": []}),
    "metadata with numbers": hostile({"__metadata__": {"a": 1}}),
    "too many dimensions": hostile({"x": entry(shape=[1] * (MOST_RANK + 1))}, b"\0" * 4),
    "a name that is too long": hostile({"x" * (MOST_NAME + 1): entry()}, b"\0" * 4),
    "a name with a NUL": hostile({"a\0b": entry()}, b"\0" * 4),
    "a name that moves the cursor": hostile({"a\x1b[2Jb": entry()}, b"\0" * 4),
    "a name with two spellings": hostile({"e\u0301": entry()}, b"\0" * 4),
    "half a surrogate as a name": hostile(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", b"\0" * 4),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_refused_in_one_sentence(what: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HOSTILE[what])
    with pytest.raises(UsageError) as caught:
        read_header(path)
    assert caught.value.exit_code == 2
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.message.isprintable()


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_damaged_file_is_refused_or_read_as_the_library_reads_it(tmp_path: Path, data: st.DataObject) -> None:
    good = hostile({"x": entry(), "yy": entry("F16", [2, 2], (4, 12))}, bytes(range(12)))
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x"
    path.write_bytes(bad)
    try:
        ours = read(path)
    except UsageError:
        return
    theirs = load_file(path)
    assert all(same_bytes(ours[name], theirs[name]) for name in theirs)
    assert set(ours) == set(theirs)


NAMES_DRAWN = st.sampled_from(["a", "b", "a.weight", "__metadata__", "é", "e\u0301", "", "x\0", "../x"])
TYPES_DRAWN = st.sampled_from([*sorted(DTYPES), "F8_E8M0", "F4", "C64", "f32", "", None, 4])
SIZES = st.sampled_from([0, 1, 2, 3, 8, -1, 2**31, 2**32, 2**63, 2**64, 1.0, True, "1"])


@st.composite
def files_drawn(draw: st.DrawFn) -> bytes:
    """A file whose header is nearly sound: tensors one behind the other, with something drawn here and there."""
    rows, place = [], 0
    for _ in range(draw(st.integers(0, 3))):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        fields: dict[str, Any] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
        odd = draw(st.integers(0, 9))
        if odd == 0:
            fields["dtype"] = draw(TYPES_DRAWN)
        elif odd == 1:
            fields["shape"] = draw(st.lists(SIZES, max_size=3))
        elif odd == 2:
            fields["data_offsets"] = draw(st.lists(SIZES, max_size=3))
        elif odd == 3:
            fields[draw(st.sampled_from(["shape", "more"]))] = draw(st.sampled_from([[], None, {}, 1]))
        rows.append((draw(NAMES_DRAWN), fields))
    text = ",".join(f"{json.dumps(name)}:{json.dumps(fields)}" for name, fields in rows)
    header = ("{" + text + "}" + draw(st.sampled_from(["", " ", "   ", "\n", ",", "\0"]))).encode()
    left = draw(st.sampled_from([0, 0, 0, 1, -1]))
    return hostile(header, bytes(max(0, place + left)), length=len(header) + draw(st.sampled_from([0, 0, 0, 1, -1])))


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(files_drawn())
def test_what_the_library_refuses_we_refuse(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    try:
        theirs: dict[str, Tensor] | None = load_file(path)
    except Exception:  # of several kinds, as the library has it
        theirs = None
    try:
        ours: dict[str, Tensor] | None = read(path)
    except UsageError:
        ours = None
    if ours is not None:
        assert theirs is not None
        assert ours.keys() == theirs.keys()
        assert all(same_bytes(ours[name], theirs[name]) for name in theirs)


def test_a_hole_is_refused_even_where_an_empty_tensor_stands_in_it(tmp_path: Path) -> None:
    header = {"x": entry(), "empty": entry(shape=[0], offsets=(6, 6)), "y": entry(offsets=(8, 12))}
    (tmp_path / "x").write_bytes(hostile(header, b"\0" * 12))
    with pytest.raises(UsageError, match="a hole or an overlap"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS"),
        (b"<!DOCTYPE html><html><body>401</body></html>", "web page"),
        (b"GGUF\3\0\0\0" + bytes(40), "GGUF"),
        (b"PK\3\4" + bytes(range(40)), "pickle"),
    ],
)
def test_what_is_often_met_instead_of_the_file_is_called_by_its_name(tmp_path: Path, start: bytes, said: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(start)
    with pytest.raises(UsageError, match=said) as caught:
        read_header(tmp_path / "x.safetensors")
    assert caught.value.hint


def test_a_header_as_long_as_a_letter_says_is_no_web_page(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(ord("<"))
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\1")
    assert list(read_header(tmp_path / "x.safetensors").tensors) == ["a"]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="no regular file"):
        read_header(tmp_path / "pipe")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev", "nothing-here"])
def test_what_is_no_file_is_refused(path: str) -> None:
    with pytest.raises(UsageError):
        read_header(Path(path))


def test_a_file_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "x", {"x": torch.arange(1000)})
    place = read_header(tmp_path / "x").tensors["x"]
    ref = Ref("x", place.dtype, place.shape, str(tmp_path / "x"), place.offset, "")
    os.truncate(tmp_path / "x", 500)
    with pytest.raises(UsageError, match="became shorter"):
        ref.bytes()


@pytest.mark.parametrize("large", [0, 1 << 40])
def test_a_large_file_is_hashed_beside_its_writing_and_to_the_same_end(
    large: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More chunks than may wait, of all sizes."""
    monkeypatch.setattr("sdforge.store.poured.SMALL", large)
    chunks = [bytes([i]) * (i * i * 7) for i in range(60)]
    size = sum(map(len, chunks))
    written = write_file(tmp_path / "x", {"x": ("U8", (size,))}, lambda _: chunks, {"a": "b"})
    data = (tmp_path / "x").read_bytes()
    assert data.endswith(b"".join(chunks))
    assert written.sha256 == hashlib.sha256(data).hexdigest()
    assert written.data_sha256 == hashlib.sha256(b"".join(chunks)).hexdigest()
    assert (written.size, written.offsets) == (len(data), {"x": len(data) - size})


def test_who_writes_too_little_is_told_so_by_a_large_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdforge.store.poured.SMALL", 0)
    before = threading.active_count()
    with pytest.raises(ValueError, match="x was given 3 bytes"):
        write_file(tmp_path / "x", {"x": ("U8", (4,))}, lambda _: [b"abc"])
    assert threading.active_count() == before
