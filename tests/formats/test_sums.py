"""Both sums of a file at once are those of hashlib, however its bytes are handed over."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdforge.kernel import sums
from sdforge.kernel.sums import Sums, SumsAtOnce, sums_of


@pytest.fixture(scope="module", autouse=True)
def usable() -> None:
    if sums._library() is None:
        pytest.skip("there is no compiled kernel, or the processor has no instructions for SHA-256")


@settings(max_examples=200)
@given(
    first=st.integers(0, 5),
    parts=st.lists(st.integers(0, 400), max_size=6),
    seed=st.binary(min_size=1, max_size=8),
)
def test_they_are_those_of_hashlib(first: int, parts: list[int], seed: bytes) -> None:
    data = hashlib.shake_256(seed).digest(64 * first + sum(parts))
    found, place = sums_of(data[: 64 * first], body=True), 64 * first
    assert isinstance(found, SumsAtOnce)
    for size in parts:
        (task,) = found.tasks(memoryview(bytearray(data[place : place + size])))
        task()
        place += size
    expected = [hashlib.sha256(data).hexdigest(), hashlib.sha256(data[64 * first :]).hexdigest()]
    assert found.digests() == expected
    assert found.digests() == expected  # to be told them ends nothing


def test_a_kernel_that_sums_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sums._library()
    assert right is not None

    class Wrong:
        def sums_usable(self) -> int:
            return 1

        def add_to_sums(self, words: Any, _: int, *rest: Any) -> None:
            right.add_to_sums(words, 1, *rest)  # of two sums the second lacks what was added

    monkeypatch.setattr(sums, "kernel", Wrong)
    sums._library.cache_clear()
    try:
        assert isinstance(sums_of(b"a" * 64, body=True), Sums)
    finally:
        sums._library.cache_clear()


def test_what_is_cut_otherwise_is_summed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    body = memoryview(bytearray(b"forge" * 30))
    for first, known in ((b"a" * 63, True), (b"a" * 64, False)):
        with monkeypatch.context() as patch:
            if not known:
                patch.setattr(sums, "_library", lambda: None)
            found = sums_of(first, body=True)
        assert isinstance(found, Sums)
        for task in found.tasks(body):
            task()
        assert found.digests() == [hashlib.sha256(first + body).hexdigest(), hashlib.sha256(body).hexdigest()]
    assert sums_of(b"a" * 64, body=False).digests() == [hashlib.sha256(b"a" * 64).hexdigest()]
