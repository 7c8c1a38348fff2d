"""What a method means is kept: change it, and its version has to change with it."""

from __future__ import annotations

from typing import Any

import pytest

from sdforge.method import method, method_groups
from tests.identity.snapshots import DEFAULTS, KEYS, defaults_of, key_of, read

METHODS = sorted(method_groups())
HOW = "`python -m tests.identity.snapshots` writes the snapshot"


@pytest.fixture(scope="module")
def keys() -> dict[str, Any]:
    return read(KEYS)


@pytest.fixture(scope="module")
def defaults() -> dict[str, Any]:
    return read(DEFAULTS)


@pytest.mark.parametrize("name", METHODS)
def test_a_default_changes_only_with_the_version(name: str, defaults: dict[str, Any]) -> None:
    assert name in defaults, f"{name} is new: {HOW}"
    assert defaults_of(name) == defaults[name], (
        f"{name} resolves to other settings than before: raise its VERSION (or mark a new setting `Since`), then {HOW}"
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_key_changes_only_with_the_version(name: str, keys: dict[str, Any]) -> None:
    assert name in keys, f"{name} is new: give it a recipe in {KEYS.name}, then {HOW}"
    row = keys[name]
    assert (method(name).version, key_of(name, row["recipe"])) == (row["version"], row["key"]), (
        f"a recipe that uses {name} has another key than before, so everything made by it is made again: "
        f"if that is meant, raise its VERSION, then {HOW}"
    )


def test_nothing_is_kept_of_methods_that_are_gone(keys: dict[str, Any], defaults: dict[str, Any]) -> None:
    assert sorted(keys) == sorted(defaults) == METHODS
