"""`forge lock --take`: of two results of one key, one is pinned; what does not say which one changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdforge.cli import main
from sdforge.lock import Lock, read_lock
from tests.lock.conftest import a_pin

ONE, OTHER, THIRD, ALONE = "12" * 32, "13" * 32, "14" * 32, "1f" * 32


@pytest.fixture
def torn(tmp_path: Path) -> Path:
    """A project whose lock holds two results of each of two keys, and the only one of a third."""
    (tmp_path / "forge.toml").touch()
    found = Lock()
    for key, digest in (("a", ONE), ("a", OTHER), ("b", THIRD), ("b", "2" * 64), ("c", ALONE)):
        pin = a_pin(key)
        pin.digest = digest
        found.pin(pin, replace=False)
    (tmp_path / "forge.lock").write_text(found.dump())
    return tmp_path


def pinned(root: Path) -> dict[str, list[str]]:
    lock = read_lock((root / "forge.lock").read_bytes(), "forge.lock")
    return {key[0]: sorted(pins) for key, pins in lock.results.items()}


@pytest.mark.parametrize("digest", ["13", OTHER])
def test_the_beginning_of_a_digest_takes_it(torn: Path, digest: str) -> None:
    assert main(["-C", str(torn), "lock", "--take", digest]) == 0
    assert pinned(torn) == {"a": [OTHER], "b": [THIRD, "2" * 64], "c": [ALONE]}


@pytest.mark.parametrize(("digest", "said"), [("1", "begins several results"), ("9", "holds no result '9'")])
def test_what_does_not_say_which_one_changes_nothing(
    torn: Path, capsys: pytest.CaptureFixture[str], digest: str, said: str
) -> None:
    before = (torn / "forge.lock").read_bytes()
    assert main(["-C", str(torn), "lock", "--take", digest]) == 2
    assert said in capsys.readouterr().err
    assert (torn / "forge.lock").read_bytes() == before
