"""Files poured out from front to back: their bytes and digests are the same with and without the page cache."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from sdforge.store import poured
from sdforge.store.poured import BLOCK, BUFFER, DIRECT, Poured

FIRST = b"begin" * 2


def pour(path: Path, size: int, step: int, *, body: bool = True) -> Poured:
    """Write numbers in pieces of `step` bytes behind FIRST."""
    data = numbers(size)
    with Poured(path, FIRST, len(FIRST) + size, body=body) as file:
        for start in range(0, size, step):
            piece = bytearray(data[start : start + step])
            file.write(piece)
            piece[:] = bytes(len(piece))  # it was taken: what becomes of it is the caller's business
        file.close()
    return file


def numbers(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


@pytest.mark.parametrize("small", [1 << 40, 0])
@pytest.mark.parametrize("size", [0, 1, BLOCK - len(FIRST), BLOCK, 2 * BUFFER - len(FIRST), 5 * BUFFER + 7])
def test_a_file_holds_what_was_given_and_is_named_by_it(
    size: int, small: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poured, "SMALL", small)
    file = pour(tmp_path / "file", size, step=(1 << 20) + 3)
    data, expected = (tmp_path / "file").read_bytes(), numbers(size)
    assert data == FIRST + expected
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    assert file.body_sha256 == hashlib.sha256(expected).hexdigest()


def test_a_disk_that_cannot_do_without_the_cache_is_written_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems say so when a file is opened, some when it is written."""
    monkeypatch.setattr(poured, "SMALL", 0)
    monkeypatch.setattr(poured, "FLUSHED", 2 * BUFFER)
    plain = pour(tmp_path / "plain", 5 * BUFFER, 1 << 20).sha256
    opened, written = os.open, os.pwrite

    def no_opening(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, mode)

    def no_writing(fd: int, data: memoryview, place: int) -> int:
        import fcntl

        if fcntl.fcntl(fd, fcntl.F_GETFL) & DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return written(fd, data, place)

    for name, own in (("open", no_opening), ("pwrite", no_writing)):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, own)
            assert pour(tmp_path / name, 5 * BUFFER, 1 << 20).sha256 == plain
        assert (tmp_path / name).read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("small", [1 << 40, 0])
def test_a_full_disk_is_said_when_the_file_is_closed_at_the_latest(
    small: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(poured, "SMALL", small)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        pour(tmp_path / "file", 100, 100)


def test_a_file_of_another_size_than_was_said_is_no_file(tmp_path: Path) -> None:
    with (
        Poured(tmp_path / "file", b"123", 5, body=False) as file,
        pytest.raises(ValueError, match="3 bytes were given"),
    ):
        file.close()
