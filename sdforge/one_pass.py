"""A formula with all that is computed on its way, resolved to bytes that are there: one reading, one writing.

What an earlier result holds under a tensor's identity is taken from its pack. What other formulas would have made, and
nobody else needs, is computed within, tensor by tensor and rounded in between as if it had been written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from sdforge.artifact import Tensor
from sdforge.formula import Made
from sdforge.plan import Step
from sdforge.planner import Planner

Look = Callable[[Iterable[str]], dict[str, Tensor]]  # identities → those whose bytes are there


class Computed(NamedTuple):
    """A tensor that is computed: what it will be, by what, and from what is there or is computed itself."""

    tensor: Tensor
    method: str
    parameters: dict[str, Any]
    inputs: tuple[Tensor | Computed, ...]


@dataclass(frozen=True)
class Pass:
    """What a formula's result will hold, component by component. own: those that the formula itself makes."""

    rows: dict[str, list[Tensor | Computed]]
    own: frozenset[str]

    def size(self) -> int:
        """Return how many bytes are written."""
        return sum(row.tensor.size for rows in self.rows.values() for row in rows if isinstance(row, Computed))


def one_pass(planner: Planner, look: Look, step: Step) -> Pass:
    """Return what a formula's result will hold. Raises UsageError for inputs that do not fit together.

    An input that a step of its own has still to make stays as it was planned, without a place.
    """
    inner = {
        row.tensor.identity: row
        for other in planner.within(step)  # inputs first, so that each is listed from what was listed just before
        for rows in planner.formula(other).components.values()
        for row in rows
        if row.method
    }
    made = planner.formula(step).components
    passed = planner.carried(step)
    own = [row.tensor for rows in made.values() for row in rows] + [t for table in passed.values() for t in table]
    there = look({tensor.identity for tensor in own if not tensor.spot} | inner.keys())

    def resolved(tensor: Tensor) -> Tensor | Computed:
        if tensor.spot:
            return tensor
        if found := there.get(tensor.identity):
            return found._replace(name=tensor.name)
        return computed(inner[tensor.identity], tensor) if tensor.identity in inner else tensor

    def computed(row: Made, tensor: Tensor) -> Computed:
        return Computed(tensor, row.method, row.parameters, tuple(map(resolved, row.inputs)))

    def result(row: Made) -> Tensor | Computed:
        if not row.method:
            return resolved(row.inputs[0]._replace(name=row.tensor.name))
        found = there.get(row.tensor.identity)
        return found._replace(name=row.tensor.name) if found else computed(row, row.tensor)

    rows = {name: [*map(result, table)] for name, table in made.items()}
    rows |= {name: [*map(resolved, table)] for name, table in passed.items()}
    return Pass(rows, frozenset(made))
