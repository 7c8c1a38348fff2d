"""`forge.lock`: the resolved sources, and what every target of every recipe came out as. Text, sorted, in git.

    version = 1
    [source.NAME]                 digest (identity), and sha256 of each file; from elsewhere also what `from` was
                                  resolved to
    [target."RECIPE:NAME"]        key, and the digest it came out as; of a formula also how its components' digests
                                  begin
    [result.KEY.DIGEST]           a content result: by which plan keys it is found, and all that `why` wants to say

Entries are independent of each other: where git cannot merge two sides, because both have new entries at one place,
it leaves its marks, and the lock is read as what both sides hold; the next `lock` or `build` writes it. It holds no
path of a machine, no host, no user and no time. Only `build` and `lock` write it.
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdforge.artifact import Artifact, Component, made_artifact
from sdforge.errors import UsageError
from sdforge.identity import canonical
from sdforge.names import is_digest
from sdforge.store.entries import Result
from sdforge.store.files import Lock as FileLock
from sdforge.store.files import publish_bytes, sweep_parts
from sdforge.toml import table

VERSION = 1
BEGINNING = 16  # digits of a component's digest in the lock: enough to say which one differs
NEXT_MARKS = {b"": b"<", b"<": b"|=", b"|": b"=", b"=": b">"}  # of a conflict, behind each
HEADER = "# Written by forge; commit it. It pins sources and results, so that another machine gets the same.\n"


@dataclass
class Pin:
    """A content result as the lock holds it. components: name → content identity."""

    key: str
    digest: str
    plans: list[str] = field(default_factory=list)
    kind: str = ""
    family: str = ""
    method: str = ""
    method_version: int = 1
    components: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    grade: str = "B"
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    sketch: str = ""
    norm: float = 0.0

    def artifact(self) -> Artifact:
        """Return the artifact that is pinned; its tensors are not listed anywhere here."""
        components = {name: Component(identity, identity, "", "") for name, identity in self.components.items()}
        return made_artifact(self.kind, self.family, components, self.facts)


@dataclass
class Lock:
    """The lock's content. sources: id → {"digest", "files", …}; targets: id → {"key", "digest", "components"}."""

    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    results: dict[str, dict[str, Pin]] = field(default_factory=dict)  # key → digest → pin
    _by_plan: dict[str, str] | None = None

    def content_key(self, plan_key: str) -> str:
        """Return the content key under which a plan key's result is pinned, or ""."""
        if self._by_plan is None:
            self._by_plan = {plan: key for key, pins in self.results.items() for p in pins.values() for plan in p.plans}
            self._by_plan |= {key: key for key in self.results}
        return self._by_plan.get(plan_key, "")

    def pins(self, content_key: str) -> dict[str, Pin]:
        return self.results.get(content_key, {})

    def pin(self, pin: Pin, *, replace: bool) -> None:
        """Enter a result; with `replace` as the only one of its key."""
        pins = {} if replace else dict(self.results.get(pin.key, {}))
        pins[pin.digest] = pin
        self.results[pin.key] = pins
        self._by_plan = None

    def joined(self, other: Lock) -> Lock:
        """Return what two sides of a merge hold: of one source or target this side's, of one key all results."""
        found = Lock(other.sources | self.sources, other.targets | self.targets, deepcopy(self.results))
        for key, pins in other.results.items():
            own = found.results.setdefault(key, {})
            for digest, pin in pins.items():
                mine = own.setdefault(digest, deepcopy(pin))
                mine.plans = sorted({*mine.plans, *pin.plans})
        return found

    def dump(self) -> str:
        """Return the lock as text."""
        lines = [HEADER, f"version = {VERSION}\n"]
        lines += [_table(("source", name), self.sources[name]) for name in sorted(self.sources)]
        lines += [_table(("target", name), self.targets[name]) for name in sorted(self.targets)]
        for key in sorted(self.results):
            for digest in sorted(self.results[key]):
                pin = self.results[key][digest]
                rest = {n: getattr(pin, n) for n in pin.__dataclass_fields__ if n not in ("key", "digest")}
                rest["plans"] = sorted(p for p in pin.plans if p != key)
                lines.append(_table(("result", key, digest), rest))
        return "\n".join(lines)

    def to_json(self) -> str:
        results = [[p.__dict__ for p in pins.values()] for pins in self.results.values()]
        return json.dumps([self.sources, self.targets, results], separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Lock:
        sources, targets, results = json.loads(text)
        return Lock(sources, targets, {rows[0]["key"]: {row["digest"]: Pin(**row) for row in rows} for rows in results})


def read_lock(source: bytes, file: str) -> Lock:
    """Read a lock; of one in which git has left both sides of a conflict, what they hold together.

    Raises UsageError for one that was not written by forge.
    """
    import tomli

    if both := _sides(source):
        ours, theirs = (read_lock(side, file) for side in both)
        return ours.joined(theirs)
    try:
        values = tomli.loads(source.decode())
    except (tomli.TOMLDecodeError, UnicodeDecodeError, ValueError, RecursionError) as error:
        merging = b"<<<<<<<" in source
        hint = "keep both sides' tables between the conflict's marks, and delete the marks" if merging else ""
        raise UsageError(f"{file} cannot be read: {error}", hint) from None
    if values.get("version") != VERSION:
        raise UsageError(f"{file} was written by another version of sdforge", hint="update sdforge")
    try:
        sources, targets, results = (_like({}, values.get(kind, {}), kind) for kind in ("source", "target", "result"))
        for name, row in sources.items():
            needed = "resolved" if "resolved" in _like({}, row, name) else "digest"
            for field_ in {needed, *({"digest", "from"} & row.keys())}:
                _like("", row.get(field_), f"{field_} of {name}")
            _like(0, row.get("size", 0), f"size of {name}")
            for file_, sha256 in _like({}, row.get("files", {}), f"files of {name}").items():
                _digest(sha256, f"{file_} of {name}")
        for name, row in targets.items():
            parts = _like({}, _like({}, row, name).get("components", {}), f"components of {name}")
            for field_, value in (row | parts).items():
                _like({} if field_ == "components" else "", value, f"{field_} of {name}")
        pins = {key: {d: _pin(key, d, row) for d, row in _like({}, rows, key).items()} for key, rows in results.items()}
        return Lock(sources, targets, {key: found for key, found in pins.items() if found})
    except TypeError as error:
        raise UsageError(f"{file} holds what forge did not write: {error}") from None


def _sides(source: bytes) -> tuple[bytes, bytes] | None:
    """Return both sides of a file with git's conflict marks (of the style `merge` or `diff3`), or None without any."""
    if b"<<<<<<< " not in source:
        return None
    sides: dict[bytes, list[bytes]] = {b"<": [], b"|": [], b">": []}
    at = b""  # the mark above: "<" ours, "|" what both began with, "=" theirs
    for line in source.splitlines(keepends=True):
        mark = line[:1] if re.match(rb"(<{7}|\|{7}|={7}|>{7})(\s|$)", line) else b""
        if mark:
            if mark not in NEXT_MARKS[at]:
                return None  # no git wrote this
            at = b"" if mark == b">" else mark
        elif at:
            sides[b">" if at == b"=" else at].append(line)
        else:
            sides[b"<"].append(line)
            sides[b">"].append(line)
    return None if at else (b"".join(sides[b"<"]), b"".join(sides[b">"]))


def _pin(key: str, digest: str, row: Any) -> Pin:
    """Return a table of the lock as a pin. Raises TypeError for fields and values that no pin has."""
    pin, example = Pin(key=key, digest=digest, **_like({}, row, digest)), Pin(key, digest)
    for text in (key, digest, *_like([], pin.plans, "plans")):
        _digest(text, "a result")
    for name in Pin.__dataclass_fields__:
        _like(getattr(example, name), getattr(pin, name), name)
    for text in pin.components.values():
        _like("", text, "a name in it")
    for row in _like([], pin.facts.get("pictures"), "pictures") if pin.kind == "dataset" else ():
        if not isinstance(row, list) or list(map(type, row[:3])) != [str, str, int]:
            raise TypeError(f"a picture is {row!r:.40}")
        _digest(row[0], "a picture")
    try:
        canonical([pin.facts, pin.settings, pin.inputs])  # dates, and numbers that are none, have no name
    except ValueError as error:
        raise TypeError(str(error)) from None
    return pin


def _digest(value: Any, what: str) -> None:
    """Raise TypeError for what is no digest: where bytes lie has its name, and other names would lead elsewhere."""
    if not isinstance(value, str) or not is_digest(value):
        raise TypeError(f"{what} is {value!r:.40}, which is no digest")


def _like(example: Any, value: Any, what: str) -> Any:
    """Return a value that is of the type of `example`. Raises TypeError."""
    if not isinstance(value, (int, float) if isinstance(example, float) else type(example)):
        raise TypeError(f"{what} is {value!r:.40}")
    return value


def pin_of(result: Result, plan_keys: list[str], manifest: dict[str, Any]) -> Pin:
    """Return a result as the lock holds it."""
    return Pin(
        key=result.key,
        digest=result.digest,
        plans=sorted(set(plan_keys) - {result.key}),
        kind=result.kind,
        family=result.family,
        method=manifest["method"],
        method_version=manifest["version"],
        components={name: c.content for name, c in result.components.items()},
        facts=result.facts,
        grade=result.grade,
        settings=manifest["settings"] | ({"seed": manifest["seed"]} if "seed" in manifest else {}),
        inputs=manifest["inputs"],
        fingerprint=result.fingerprint,
        sketch=result.record.get("sketch", ""),
        norm=result.record.get("norm", 0.0),
    )


def update_lock(path: Path, guard: FileLock, changes: Lock, replace: set[str], known: set[str]) -> None:
    """Merge entries into the lock on the disk, one writer at a time; write it only if it changes.

    replace: content keys whose pins are replaced. known: recipes whose targets are all in `changes`; others of these
    recipes are dropped. Results stay.
    """
    guard.acquire(wait=True)
    try:
        before = path.read_bytes() if path.is_file() else b""
        lock = read_lock(before, path.name) if before else Lock()
        lock.sources |= changes.sources
        kept = {
            name: row
            for name, row in lock.targets.items()
            if name in changes.targets or name.split(":")[0] not in known
        }
        lock.targets = kept | changes.targets
        for key, pins in changes.results.items():
            for pin in pins.values():
                old = lock.results.get(key, {}).get(pin.digest)
                entry = deepcopy(pin)
                if old:
                    entry.plans = sorted({*old.plans, *pin.plans})
                lock.pin(entry, replace=key in replace)
        after = lock.dump().encode()
        sweep_parts(path.parent)
        if after != before:
            publish_bytes(after, path, path.parent, 0o644)
    finally:
        guard.release()


def _table(path: tuple[str, ...], values: dict[str, Any]) -> str:
    return table(path, {name: value for name, value in values.items() if value not in ({}, "")})
