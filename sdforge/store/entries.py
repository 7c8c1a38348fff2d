"""What the store keeps under a key: results, aliases and manifests, as values and as files whose damage is told.

A file is read by a function that raises ValueError for one that is not what was written; what to do about it is the
caller's choice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdforge.artifact import Artifact, Component, Tensor, made_artifact
from sdforge.identity import digest_of_text
from sdforge.store.files import read_entry

CHANGED = "its bytes are not what they were"


@dataclass(frozen=True)
class Result:
    """What an action made.

    components: those that the action made (others pass from its first input). files: path → [sha256, bytes] for
    exports and pictures. packs: files in which its bytes lie, by sha256. record: what happened: device, versions, …
    """

    key: str
    digest: str
    kind: str
    family: str = ""
    components: dict[str, Component] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[Any]] = field(default_factory=dict)
    packs: tuple[str, ...] = ()
    grade: str = "A"
    fingerprint: dict[str, Any] = field(default_factory=dict)
    made: float = 0.0  # seconds since 1970
    record: dict[str, Any] = field(default_factory=dict)

    def to_json(self, *, record: bool = True) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if record or name != "record"}
        return found | {"components": {name: list(c) for name, c in self.components.items()}, "packs": list(self.packs)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Result:
        components = {name: Component(*row) for name, row in value["components"].items()}
        return Result(**(value | {"components": components, "packs": tuple(value["packs"])}))

    def dump(self) -> bytes:
        """Return the file in which the store keeps this; `sum` tells damage."""
        value = self.to_json()
        return json.dumps(value | {"sum": sum_of(value)}, indent=1, sort_keys=True).encode()

    @staticmethod
    def load(data: bytes) -> Result:
        """Return the result that `dump` wrote. Raises ValueError, KeyError, TypeError for anything else."""
        value = json_in(data)
        if value.pop("sum") != sum_of(value):
            raise ValueError(CHANGED)
        return Result.from_json(value)

    def needs(self) -> set[str]:
        """Return the objects (or source files) without which the result is of no use."""
        return set(self.packs) | {component.table for component in self.components.values()}

    def objects(self) -> set[str]:
        """Return all objects that belong to the result: what it needs, and what is kept of its run."""
        kept = {str(self.record[name]) for name in ("losses", "log") if name in self.record}
        return self.needs() | kept | {sha256 for _, _, sha256 in self.record.get("samples", [])}

    def artifact(self) -> Artifact:
        """Return the artifact, as far as the action made it."""
        return made_artifact(self.kind, self.family, self.components, self.facts)


def json_in(data: bytes) -> Any:
    """Return what an entry says. Raises ValueError, in our words, for what is no JSON (any more)."""
    try:
        return json.loads(data)
    except ValueError:
        raise ValueError(CHANGED) from None


def sum_of(value: dict[str, Any]) -> str:
    """Return the sum by which damage of an entry is told."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load_result(path: Path) -> Result:
    """Return a result from its file. Raises FileNotFoundError, and ValueError for a damaged one."""
    try:
        result = Result.load(read_entry(path))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is no result ({type(error).__name__})") from None
    if (result.key, result.digest) != (path.parent.name, path.stem):
        raise ValueError("it stands under another name")
    return result


def table_bytes(tensors: Iterable[Tensor]) -> bytes:
    """Return a table of tensors as the store keeps it."""
    rows = [[*t[:6], list(t.spot) if t.spot else None] for t in sorted(tensors)]
    return json.dumps(rows, separators=(",", ":")).encode()


def alias_text(key: str, content_key: str) -> str:
    """Return an alias's content: where it leads, and a sum over both keys, so that an exchanged one is known."""
    return f"{content_key} {hashlib.sha256(f'alias {key} {content_key}'.encode()).hexdigest()[:16]}"


def alias_in(key: str, data: bytes) -> str:
    """Return the key that an alias leads to. Raises ValueError for a damaged one."""
    content_key = data[:64].decode(errors="replace")
    if data.decode(errors="replace") != alias_text(key, content_key):
        raise ValueError("it is not the alias that its name says")
    return content_key


def preimage_in(key: str, data: bytes) -> dict[str, Any]:
    """Return a manifest, or what a data set is named by. Raises ValueError for one that is not that of its key."""
    try:
        value = json_in(data)
    except RecursionError:
        raise ValueError("it is no manifest") from None
    if not isinstance(value, dict):
        raise ValueError("it is no manifest")
    summed = "sum" in value and value["sum"] == sum_of(value | {"sum": key})
    if not summed and digest_of_text("action", data.decode()) != key:
        raise ValueError("it is not the manifest of its key")
    return value


@dataclass
class Known:
    """What the store knows under one key: results, where an alias leads, and what a formula would make."""

    results: list[Result] = field(default_factory=list)
    alias: str = ""
    formula: dict[str, Any] | None = None  # {"components": name → [identity, dtype], "facts": …}

    def dump(self) -> str:
        results = [result.to_json(record=False) for result in self.results]
        return json.dumps([results, self.alias, self.formula], separators=(",", ":"))

    @staticmethod
    def load(text: str) -> Known:
        results, alias, formula = json.loads(text)
        return Known([Result.from_json(value) for value in results], alias, formula)
