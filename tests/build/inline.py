"""Builds in the process of the tests: orders can be looked at, and torch is imported once."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdforge.build import Build
from sdforge.errors import ForgeError
from sdforge.executors import Handle
from sdforge.executors.inline import Inline
from sdforge.order import Computation, Order
from sdforge.plan import Plan
from sdforge.ref import Ref
from sdforge.session import Session, open_session
from sdforge.under_way import Options, Summary


class Silent:
    """A reporter that says nothing."""

    def __getattr__(self, _: str) -> Any:
        return lambda *_, **__: None


@dataclass
class Bench:
    """A project that is built here. orders: what the last build had computed, by target; expected: if it said so."""

    root: Path
    orders: dict[str, Order] = field(default_factory=dict)
    expected: bool = False

    def recipe(self, text: str, name: str = "r") -> None:
        path = self.root / "recipes" / f"{name}.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'family = "sd15"\n{text}')

    def session(self) -> Session:
        return open_session(self.root)

    def plan(self, *targets: str) -> Plan:
        session = self.session()
        return session.plan(session.resolve(list(targets) or ["r"]))

    def states(self, *targets: str) -> dict[str, str]:
        return {step.node.target.name: step.state for step in self.plan(*targets).steps.values()}

    def build(self, *targets: str) -> Summary:
        summary = self.run(*targets)
        assert not summary.failed, summary.failed
        return summary

    def failure(self, target: str) -> ForgeError:
        """Build recipe `r`, in which this target must fail, and return why."""
        return self.run().failed[f"r:{target}"]

    def run(self, *targets: str) -> Summary:
        self.orders.clear()
        self.expected = False
        session = self.session()
        summary = Build(session, self, Silent(), Options(device="cpu")).run(session.resolve(list(targets) or ["r"]))
        session.store.close()
        return summary

    def built(self, *targets: str) -> list[str]:
        return [identifier.partition(":")[2] for identifier in self.build(*targets).built]

    def computed(self, target: str) -> set[str]:
        """Name the tensors (`component.name`) that the last build computed for a target."""
        order = self.orders.get(f"r:{target}")
        return {f"{c.component}.{c.name}" for c in order.compute} if order else set()

    def methods(self) -> set[str]:
        """The methods by which the last build's formulas computed."""
        return {m for order in self.orders.values() for c in order.compute for m in _methods(c)}

    def read(self) -> set[tuple[str, int]]:
        """The places (file, offset) that the last build's formulas read."""
        return {place for order in self.orders.values() for c in order.compute for place in _places(c)}

    def bytes_of(self, target: str, recipe: str = "r") -> dict[str, bytes]:
        """Return the bytes of all tensors of a target: `component.name` → bytes."""
        session = self.session()
        step = session.plan(session.resolve([f"{recipe}:{target}"])).steps[f"{recipe}:{target}"]
        assert step.artifact is not None
        found = {}
        for component, listed in step.artifact.components.items():
            for tensor in session.store.table(listed) if component != "tokenizer" else ():
                assert tensor.spot is not None
                path = session.find(tensor.spot.file)
                ref = Ref(tensor.name, tensor.dtype, tensor.shape, str(path), tensor.spot.offset, tensor.xxh3)
                found[f"{component}.{tensor.name}"] = bytes(ref.bytes())
        return found

    def packs(self) -> dict[str, int]:
        """The packs that the store holds, and their bytes."""
        folder = self.root / "cache" / "v1" / "objects"
        return {p.name: p.stat().st_size for p in folder.glob("*/*") if p.read_bytes()[8:9] == b"{"}

    def clone(self, root: Path) -> Bench:
        """Copy what git would hold."""
        shutil.copytree(self.root, root, ignore=shutil.ignore_patterns("cache", "out", ".forge"))
        return Bench(root)

    # an executor
    def expect(self) -> None:
        self.expected = True

    def submit(self, order: Order, log: str, lock: int) -> Handle:  # noqa: ARG002
        self.orders[order.target] = order
        return Inline(Order.from_json(json.loads(json.dumps(order.to_json()))))

    def close(self) -> None:
        pass


def _methods(computation: Computation) -> set[str]:
    inner = [_methods(each) for each in computation.inputs if isinstance(each, Computation)]
    return {computation.method}.union(*inner)


def _places(computation: Computation) -> set[tuple[str, int]]:
    found = set()
    for each in computation.inputs:
        found |= {(each.path, each.offset)} if isinstance(each, Ref) else _places(each)
    return found
