"""A merge for tests, whose version tests raise: half of each."""

from __future__ import annotations

from typing import Any

VERSION = 1


def halves(first: Any, second: Any) -> Any:
    """(A + B) / 2."""
    return (first + second) * 0.5


def simplify(identities: list[str], parameters: dict[str, Any]) -> Any:
    """Equal inputs pass."""
    return identities[0] if identities[0] == identities[1] else (identities, parameters)
