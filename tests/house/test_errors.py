"""Every failure that a person may see has an exit code of DESIGN §6, rule 9."""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

import sdforge
from sdforge.cli import main
from sdforge.errors import (
    ActionFailed,
    BrokenPromise,
    BusyError,
    ForgeError,
    Interrupted,
    RecipeError,
    ResourceError,
    UsageError,
    exit_code,
    nearest,
)

CODES = {1, 2, 3, 4, 5, 130, 143}
BELOW_THE_LINE = ("sdforge.run", ".adapter", ".draw", ".load", "sdforge.exact")


def failures() -> list[type[ForgeError]]:
    """Every subclass in the package, those in modules that plan included."""
    for module in pkgutil.walk_packages(sdforge.__path__, "sdforge."):
        if not module.name.startswith("sdforge.run") and not module.name.endswith((*BELOW_THE_LINE, "__main__")):
            importlib.import_module(module.name)
    found: list[type[ForgeError]] = [ForgeError]
    for each in found:  # grows while it is walked
        found += each.__subclasses__()
    return found


@pytest.mark.parametrize("failure", failures())
def test_every_failure_has_an_exit_code(failure: type[ForgeError]) -> None:
    assert failure.exit_code in CODES


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (ActionFailed, 1),
        (UsageError, 2),
        (RecipeError, 2),
        (BrokenPromise, 3),
        (ResourceError, 4),
        (BusyError, 5),
    ],
)
def test_the_exit_codes_are_those_of_the_design(failure: type[ForgeError], code: int) -> None:
    assert failure.exit_code == code


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
def test_an_interrupt_says_which_signal_it_was(number: int, code: int) -> None:
    assert Interrupted("interrupted", signal=number).code == code


@pytest.mark.parametrize(
    ("errors", "code"),
    [
        ([], 0),
        ([ActionFailed("x")], 1),
        ([ActionFailed("x"), ResourceError("x")], 4),
        ([ResourceError("x"), BrokenPromise("x"), ActionFailed("x")], 3),
        ([BrokenPromise("x"), Interrupted("x", signal=2)], 130),
        ([Interrupted("x", signal=2), Interrupted("x", signal=15)], 143),
        ([BusyError("x"), ActionFailed("x")], 5),
    ],
)
def test_of_several_failures_the_worst_has_the_exit_code(errors: list[ForgeError], code: int) -> None:
    assert exit_code(errors) == code


def test_a_guess_is_near_or_nothing() -> None:
    assert nearest("wieghts", ["weights", "blocks"]) == "weights"
    assert nearest("zzz", ["weights", "blocks"]) == ""


ENDS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize("swallowed", [False, True])
@pytest.mark.parametrize(("number", "code"), ENDS)
def test_a_signal_ends_a_command_which_takes_away_what_is_half_written(
    number: int, code: int, swallowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Also where a library makes another error of it, as torch does that is being imported."""

    def run(_: object) -> int:
        with tempfile.TemporaryDirectory(dir=tmp_path):
            try:
                os.kill(os.getpid(), number)
                time.sleep(10)
            except (KeyboardInterrupt, SystemExit):
                if swallowed:
                    raise AttributeError from None
                raise
        return 0

    monkeypatch.setattr("sdforge.cli.run", run)
    before = signal.getsignal(number)
    assert main(["du"]) == code
    assert capsys.readouterr().err == "error: interrupted\n"
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) == before


def test_a_signal_that_is_ignored_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `nohup`."""

    def run(_: object) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 7

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr("sdforge.cli.run", run)
        assert main(["du"]) == 7
    finally:
        signal.signal(signal.SIGHUP, before)
