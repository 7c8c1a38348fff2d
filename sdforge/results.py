"""What an action made → a result in the store: bytes first, then tables, the result last."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdforge.artifact import Component, Spot, Tensor, artifact_identity, dataset_identity
from sdforge.errors import BrokenPromise
from sdforge.formula import common_dtype
from sdforge.identity import component_identity, digest_of_text, tensor_identity
from sdforge.lockfile import LockFile
from sdforge.manifest import likeness
from sdforge.one_pass import Computed, Pass
from sdforge.order import Outcome
from sdforge.plan import Step
from sdforge.session import Session
from sdforge.store.entries import Result
from sdforge.store.files import sha256_of


@dataclass(frozen=True)
class Made:
    """An outcome with what it answers: the step, the key and manifest under which it ran, its work folder.

    formula: what the order of a formula was made from.
    """

    step: Step
    outcome: Outcome
    key: str
    manifest: str
    work: Path
    seconds: float
    formula: Pass | None = None


class Publisher:
    """Moves outcomes into the store."""

    def __init__(self, session: Session, lockfile: LockFile) -> None:
        self.session, self.store, self.lockfile = session, session.store, lockfile

    def publish(self, made: Made) -> Result:
        """Keep what was made. Raises BrokenPromise for a formula or an export that is not what it was before."""
        step, outcome = made.step, made.outcome
        if outcome.pack:
            self.store.put_file(made.work / outcome.pack, outcome.sha256)
        if outcome.apart:
            self.store.put_file(made.work / outcome.apart[0], outcome.apart[1])
        if outcome.laid:
            self.store.note_laid(outcome.sha256, *outcome.laid)
        components, packs = self._components(outcome, made.formula)
        kind = step.node.target.signature.makes
        if kind in ("files", "pictures"):
            digest = digest_of_text(kind, json.dumps(outcome.files, sort_keys=True))
        elif kind == "dataset":
            digest = dataset_identity(outcome.facts["pictures"], 0)
        else:
            # what is carried for others is no part of what the key decides
            own = made.formula.own if made.formula else components
            digest = artifact_identity(kind, {name: components[name].content for name in own}, outcome.facts)
        if step.restore and step.result and step.result.digest != digest:
            raise BrokenPromise(
                f"{step.id} came out as {digest[:12]}, and was exported as {step.result.digest[:12]} before",
                hint="this is a mistake in forge: the same key makes the same files",
            )
        if kind in ("pictures", "dataset"):
            packs = tuple(sorted({self._keep_file(made.work / name) for name in outcome.files}))
        if step.kind == "formula":
            self.lockfile.compare(step, components)
        result = Result(
            made.key,
            digest,
            kind,
            step.node.recipe.family,
            components,
            outcome.facts,
            outcome.files,
            packs,
            outcome.grade,
            outcome.fingerprint,
            time.time(),
            self._record(made),
        )
        self.store.keep(result, made.manifest)
        if made.key != step.key:
            self.store.add_alias(step.key, made.key, step.manifest)
        if step.kind == "content":
            self.store.add_alias(likeness(step), made.key)
        return result

    def _record(self, made: Made) -> dict[str, Any]:
        """What happened, with losses and log as objects of their own."""
        record = dict(made.outcome.record)
        if losses := record.pop("losses", None):
            lines = "".join(json.dumps({"step": i + 1, "loss": loss}) + "\n" for i, loss in enumerate(losses))
            record |= {"losses": self.store.put_bytes(lines.encode()), "loss": losses[-1]}
        if samples := record.get("samples"):
            record["samples"] = [
                [step, prompt, self.store.put_bytes(Path(path).read_bytes())] for step, prompt, path in samples
            ]
        log = made.work / "log.txt"
        if log.is_file() and (text := log.read_bytes()):
            record["log"] = self.store.put_bytes(text)
        return record | {"target": made.step.id, "seconds": round(made.seconds, 3)}

    def _keep_file(self, path: Path) -> str:
        sha256 = sha256_of(path)
        if not self.store.object(sha256).exists():
            copy = path.with_name(path.name + ".object")
            shutil.copyfile(path, copy)
            self.store.put_file(copy, sha256)
        return sha256

    def _components(self, outcome: Outcome, formula: Pass | None) -> tuple[dict[str, Component], tuple[str, ...]]:
        """Return the components that an action made, their tables kept, and the files in which their bytes lie."""
        made = {name: {row[0]: row for row in rows} for name, rows in outcome.components.items()}
        tables: dict[str, list[Tensor]] = {}
        if formula is not None:
            for name, rows in formula.rows.items():
                tables[name] = [
                    _with_bytes(row.tensor, made[name][row.tensor.name], outcome) if isinstance(row, Computed) else row
                    for row in rows
                ]
        else:
            for name, found in made.items():
                tables[name] = [_from_row(row, outcome.sha256) for row in found.values()]
        components, packs = {}, set()
        for name, table in tables.items():
            content = component_identity((t.name, tensor_identity(t.dtype, t.shape, t.sha256)) for t in table)
            identity = component_identity((t.name, t.identity) for t in table) if formula else content
            dtype = common_dtype(t.dtype for t in table)
            components[name] = Component(identity, content, self.store.put_table(table), dtype)
            packs |= {t.spot.file for t in table if t.spot}
        return components, tuple(sorted(packs))


def _with_bytes(tensor: Tensor, row: list[Any], outcome: Outcome) -> Tensor:
    _, _, _, sha256, xxh3, offset, *apart = row
    return tensor._replace(sha256=sha256, xxh3=xxh3, spot=Spot(outcome.apart[1] if apart else outcome.sha256, offset))


def _from_row(row: list[Any], pack: str) -> Tensor:
    name, dtype, shape, sha256, xxh3, offset = row
    return Tensor(name, dtype, tuple(shape), tensor_identity(dtype, shape, sha256), sha256, xxh3, Spot(pack, offset))
