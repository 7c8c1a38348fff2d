"""That a large source is being read is shown when it takes longer than a moment."""

from __future__ import annotations

import io

import pytest

from sdforge.report import hashing
from sdforge.report.hashing import Hashing


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(hashing.time, "monotonic", lambda: now[0])
    return now


def test_a_moment_is_not_worth_a_word(clock: list[float]) -> None:
    stream = Terminal()
    show = Hashing(stream)
    for done in range(10):
        clock[0] += 0.09
        show("base", done, 10)
    assert stream.getvalue() == ""


def test_a_terminal_shows_the_share_and_is_clean_afterwards(clock: list[float]) -> None:
    stream = Terminal()
    show = Hashing(stream)
    show("base", 0, 200)
    clock[0] += 1.5
    show("base", 50, 200)
    assert stream.getvalue() == "\r  reading base: 25 %\x1b[K"
    clock[0] += 1.5
    show("base", 200, 200)
    assert stream.getvalue().endswith("\r\x1b[K")


def test_elsewhere_it_says_a_line_now_and_then(clock: list[float]) -> None:
    stream = io.StringIO()
    show = Hashing(stream)
    for done in range(31):
        show("base", done, 30)
        clock[0] += 1
    assert stream.getvalue() == "  reading base: 36 %\n  reading base: 73 %\n"
