"""Files of kinds for which no other program has a form: tensors by their names, and metadata that says the rest.

Metadata: `sdforge.kind`, `sdforge.family`, and `sdforge.facts` as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from sdforge.formats.null_text import FACTS, FAMILY, KIND
from sdforge.identity import canonical

Value = TypeVar("Value")


def own_metadata(kind: str, family: str, facts: dict[str, Any]) -> dict[str, str]:
    """Return the metadata of a file."""
    return {KIND: kind, FAMILY: family, FACTS: canonical(facts)}


def own_statement(metadata: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """Return (kind, facts) that a file of ours states; kind "" where it states none."""
    return metadata.get(KIND, ""), json.loads(metadata.get(FACTS, "{}"))


def own_names(components: Mapping[str, Mapping[str, Value]]) -> dict[str, Value]:
    """Return name in a file → what is called so in the artifact (component → name → value).

    Where there are several components, they stand before the names.
    """
    if len(components) == 1:
        return dict(*components.values())
    return {f"{component}.{name}": value for component, found in components.items() for name, value in found.items()}
