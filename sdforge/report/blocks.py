"""What weight each block gets: lists, presets and patterns of block weights, spelled out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias, get_args

from sdforge.blocks import Place
from sdforge.families import family
from sdforge.identity import number
from sdforge.method import ELEMENTS, block_parameters, block_places, method, per_block
from sdforge.plan import Step

Row: TypeAlias = "list[float | None]"


@dataclass(frozen=True)
class BlockTable:
    """The weights of a target, by block. columns: what has them; rows: one weight each, or None where a block stays.

    A pattern that names some tensors of a block has a row of its own, in which what does not have the pattern is None.
    """

    setting: str
    columns: list[str]
    rows: dict[Place, Row | None]

    def to_json(self) -> dict[str, Any]:
        rows = {".".join(filter(None, place)): values for place, values in self.rows.items()}
        return {"setting": self.setting, "columns": self.columns, "rows": rows}

    def lines(self) -> Iterator[str]:
        """Yield the table for a person: blocks that follow each other and get the same are one row."""
        width = max(map(len, [*self.columns, "0.0000"]))
        yield f"{'':<26}" + "".join(f"  {name:>{width}}" for name in self.columns)
        for (_, values), run in groupby(self.rows, lambda place: (place[0], self.rows[place])):
            places = list(run)
            name = ".".join(filter(None, places[0])) + (f" … {places[-1][1]}" if len(places) > 1 else "")
            shown = ["stays"] if values is None else ["" if each is None else number(each) for each in values]
            yield f"{name:<26}" + "".join(f"  {text:>{width}}" for text in shown)


def block_table(step: Step) -> BlockTable | None:
    """Return what weight each block gets of a merge or a bake; None for a target without such weights.

    Raises SettingErrors for lists and patterns that say nothing.
    """
    target = step.node.target
    found = method(target.signature.name)
    seed = {} if target.seed is None else {"seed": target.seed}
    table = found.table.model_validate(target.raw | seed)
    if target.signature.name == "bake":
        return _of_bake(step, table)
    return _of_merge(step, table) if per_block(found.table) else None


def _of_merge(step: Step, table: Any) -> BlockTable:
    kind, varies = family(step.node.recipe.family), per_block(type(table))
    at = block_parameters(table, kind)
    rows: dict[Place, Row | None] = {}
    for place in block_places(kind):
        settings = at(*place, "")
        rows[place] = None if settings is None else _row(settings[varies])
    rows |= {
        (pattern, ""): _row(value) for pattern, value in getattr(table, "blocks", {}).items() if ELEMENTS in pattern
    }
    several = isinstance(getattr(table, varies), list)
    columns = [use.reference for use in step.node.target.uses] if several else [varies]
    return BlockTable(varies, columns, rows)


def _row(value: Any) -> Row:
    return value if isinstance(value, list) else [value]


def _of_bake(step: Step, table: Any) -> BlockTable:
    from sdforge.edits.bake.update import Strengths

    kind, fields = family(step.node.recipe.family), type(table).model_fields
    strengths = {
        use.reference: Strengths(use.use or {}, kind, get_args(fields[use.role].annotation)[1])
        for use in step.node.target.uses
        if use.use is not None
    }
    places = [place for place in block_places(kind) if place[0] not in kind.kept]
    rows: dict[Place, Row | None] = {place: [each.in_block(place) for each in strengths.values()] for place in places}
    told = {pattern: None for each in strengths.values() for pattern in each.use.blocks if ELEMENTS in pattern}
    rows |= {(pattern, ""): [each.use.blocks.get(pattern) for each in strengths.values()] for pattern in told}
    return BlockTable("strength", list(strengths), rows)
